"""A pack that is left as soon as one trial is done: the others stay in their slots and go on as if nothing had been."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial

Trials = Callable[..., Trial]


@pytest.fixture
def make_trainer(
    base: PreTrainedModel, train_rows: list[TokenRow], validation_rows: list[TokenRow], tmp_path: Path
) -> Callable[[str], Trainer]:
    return lambda name: Trainer(base, train_rows, validation_rows, tmp_path / name)


def _never() -> bool:
    return False


def _weights(trainer: Trainer, trial: Trial) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(trainer._shelf.folder / trial.id)
    assert newest is not None
    return newest.adapter()


def test_the_pack_comes_back_when_one_is_done_and_the_other_goes_on_from_memory(
    make_trainer: Callable[[str], Trainer], trial: Trials
) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "checkpoint_every_steps": 50, "gradient_accumulation_steps": 3}
    short, long = trial("short", **settings, seed=1), trial("long", **settings, seed=2)
    alone = make_trainer("alone")
    (expected,) = alone.run([long], None)

    trainer = make_trainer("held")
    first = trainer.run([long, short], [6, 2], should_return=_never)
    assert (first[1].step, first[1].interrupted) == (2, False)
    assert first[1].validation_loss is not None
    assert (first[0].step, first[0].interrupted, first[0].validation_loss) == (2, True, None)
    assert trainer.held == {"long"}
    assert newest_checkpoint(trainer._shelf.folder / "long") is None, "it was written down though it goes on"

    other = trial("other", **settings, seed=3)
    second = trainer.run([long, other], [6, 1], should_return=_never)
    assert (second[0].step, second[1].step) == (3, 1)
    (done,) = trainer.run([long], [6], should_return=_never)
    assert trainer.held == frozenset()
    assert done.validation_loss == pytest.approx(expected.validation_loss, abs=5e-5)
    assert [entry["step"] for entry in done.curve] == list(range(1, 7))
    assert [entry["loss"] for entry in done.curve] == pytest.approx([e["loss"] for e in expected.curve], abs=5e-5)


def test_called_back_in_the_middle_of_a_step_nothing_is_computed_twice(
    make_trainer: Callable[[str], Trainer], trial: Trials
) -> None:
    one = trial("one", max_steps=3, gradient_accumulation_steps=4)
    whole = make_trainer("whole")
    (expected,) = whole.run([one], None)
    trainer = make_trainer("often")
    asked = 0

    def every_other_pass() -> bool:
        nonlocal asked
        asked += 1
        return asked % 2 == 0

    calls = 1
    (progress,) = trainer.run([one], None, should_return=every_other_pass)
    while progress.interrupted:
        calls += 1
        (progress,) = trainer.run([one], None, should_return=every_other_pass)
    assert calls > 3
    assert progress.validation_loss == expected.validation_loss
    assert {k: v.tolist() for k, v in _weights(trainer, one).items()} == {
        k: v.tolist() for k, v in _weights(whole, one).items()
    }


def test_a_held_trial_that_is_not_named_again_is_checkpointed_and_let_go(
    make_trainer: Callable[[str], Trainer], trial: Trials, base: PreTrainedModel
) -> None:
    names = [name for name, _ in base.named_modules()]
    long, short, next_one = (trial(name, max_steps=5, checkpoint_every_steps=50) for name in ("long", "short", "next"))
    trainer = make_trainer("released")
    trainer.run([long, short], [5, 2], should_return=_never)
    trainer.run([next_one], [1], should_return=_never)
    kept = newest_checkpoint(trainer._shelf.folder / "long")
    assert kept is not None and kept.step == 2
    assert [name for name, _ in base.named_modules()] == names
    (resumed,) = trainer.run([long], None)
    assert resumed.step == 5


def test_a_stop_leaves_nothing_held(make_trainer: Callable[[str], Trainer], trial: Trials) -> None:
    long, short = (trial(name, max_steps=5, checkpoint_every_steps=50) for name in ("long", "short"))
    trainer = make_trainer("stopped")
    trainer.run([long, short], [5, 2], should_return=_never)
    (stopped,) = trainer.run([long], None, should_stop=lambda: True, should_return=_never)
    assert stopped.interrupted and trainer.held == frozenset()
    kept = newest_checkpoint(trainer._shelf.folder / "long")
    assert kept is not None and kept.step == 2
