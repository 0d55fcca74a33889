"""The loop: bit-equal segments and resumes, guards, refusals, and independence of trials."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.model.base import load_quantized
from qlora_core.model.loss import sequence_losses
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.optimizer import OPTIMIZERS
from qlora_core.training.schedule import learning_rate
from qlora_core.training.trainer import PassLimits, Trainer
from qlora_core.training.trial import Trial, TrialProgress

Rows = Callable[..., list[TokenRow]]
Trials = Callable[..., Trial]


@pytest.fixture
def trainer(
    base: PreTrainedModel, train_rows: list[TokenRow], validation_rows: list[TokenRow], tmp_path: Path
) -> Callable[[str], Trainer]:
    """Makes a trainer over one base with a work folder of its own."""
    return lambda name: Trainer(base, train_rows, validation_rows, tmp_path / name)


def _run(trainer: Trainer, trial: Trial, until_step: int | None = None, **settings: Any) -> TrialProgress:
    (progress,) = trainer.run([trial], until_step, **settings)
    assert progress.error is None
    return progress


def _error(trainer: Trainer, trial: Trial) -> str:
    (progress,) = trainer.run([trial], None)
    assert progress.error is not None and progress.validation_loss is None and not progress.interrupted
    return progress.error


def _weights(folder: Path, trial: Trial) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(folder / trial.id)
    assert newest is not None
    return newest.adapter()


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _stop_after(polls: int) -> Callable[[], bool]:
    left = iter(range(polls))
    return lambda: next(left, None) is None


# --- what comes back


def test_training_lowers_both_losses_and_records_every_step(
    trainer: Callable[[str], Trainer], trial: Trials, base: PreTrainedModel, validation_rows: list[TokenRow]
) -> None:
    one = trial(max_steps=40, learning_rate=1e-2)
    before = sequence_losses(base, validation_rows, batch_size=1)
    untrained = sum(nats for nats, _ in before) / sum(tokens for _, tokens in before)
    progress = _run(trainer("a"), one)
    assert (progress.id, progress.step, progress.total_steps) == ("t000", 40, 40)
    assert not progress.interrupted
    assert [entry["step"] for entry in progress.curve] == list(range(1, 41))
    assert [entry["learning_rate"] for entry in progress.curve] == [learning_rate(one.params, s, 40) for s in range(40)]
    assert all(set(entry) == {"step", "loss", "learning_rate", "grad_norm", "tokens"} for entry in progress.curve)
    assert progress.tokens == sum(entry["tokens"] for entry in progress.curve)
    assert progress.seconds > 0
    assert progress.curve[-1]["loss"] < progress.curve[0]["loss"] - 0.4
    assert progress.validation_loss is not None and progress.validation_loss < untrained - 0.2


def test_one_epoch_trains_every_labelled_token_once(
    trainer: Callable[[str], Trainer], trial: Trials, train_rows: list[TokenRow]
) -> None:
    progress = _run(trainer("a"), trial(max_steps=None, epochs=1.0))
    assert progress.total_steps == 5  # 26 rows by 6, the last batch of 2
    assert progress.tokens == sum(sum(row.loss_mask[1:]) for row in train_rows)


def test_validation_loss_is_token_weighted_over_all_rows(
    trainer: Callable[[str], Trainer], trial: Trials, base: PreTrainedModel, validation_rows: list[TokenRow]
) -> None:
    progress = _run(trainer("a"), trial(max_steps=1, learning_rate=1e-12))
    nats = tokens = 0.0
    for row in validation_rows:
        with torch.no_grad():
            log_p = torch.log_softmax(base(input_ids=torch.tensor([row.input_ids])).logits[0].double(), dim=-1)
        for place in range(1, len(row.input_ids)):
            nats -= row.loss_mask[place] * log_p[place - 1, row.input_ids[place]].item()
            tokens += row.loss_mask[place]
    assert progress.validation_loss == pytest.approx(nats / tokens, rel=1e-5)


def test_gradient_checkpointing_gives_the_same_run(
    trainer: Callable[[str], Trainer], trial: Trials, tmp_path: Path
) -> None:
    plain = _run(trainer("a"), trial())
    checkpointed = _run(trainer("b"), trial(gradient_checkpointing=True))
    assert plain.curve == checkpointed.curve
    assert plain.validation_loss == checkpointed.validation_loss
    assert _equal(_weights(tmp_path / "a", trial()), _weights(tmp_path / "b", trial()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_really_ran_is_recorded(trainer: Callable[[str], Trainer], trial: Trials, optimizer: str) -> None:
    assert _run(trainer("a"), trial(max_steps=1, optimizer=optimizer)).optimizer.startswith(optimizer)


# --- the same result however the run got there


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_segments_are_one_run_bit_for_bit(
    trainer: Callable[[str], Trainer], trial: Trials, tmp_path: Path, optimizer: str
) -> None:
    one = trial(optimizer=optimizer, lora_rank=48)  # wide enough for 8-bit optimizer state
    straight = _run(trainer("straight"), one)
    rungs = [_run(trainer("rungs"), one, until) for until in (2, 5, None)]
    assert [progress.step for progress in rungs] == [2, 5, 8]
    assert rungs[-1].curve == straight.curve
    assert rungs[-1].validation_loss == straight.validation_loss != rungs[0].validation_loss
    assert _equal(_weights(tmp_path / "rungs", one), _weights(tmp_path / "straight", one))


@pytest.mark.parametrize("polls", [0, 1, 4, 6])
def test_a_stop_is_answered_before_the_next_step_and_loses_nothing(
    trainer: Callable[[str], Trainer], trial: Trials, tmp_path: Path, polls: int
) -> None:
    straight = _run(trainer("straight"), trial())
    stopped = _run(trainer("stopped"), trial(), should_stop=_stop_after(polls))
    assert stopped.interrupted and stopped.validation_loss is None
    assert stopped.step == polls
    newest = newest_checkpoint(tmp_path / "stopped" / "t000")
    assert (newest.step if newest else 0) == polls
    resumed = _run(trainer("stopped"), trial())
    assert not resumed.interrupted
    assert resumed.curve == straight.curve
    assert _equal(_weights(tmp_path / "stopped", trial()), _weights(tmp_path / "straight", trial()))


def test_a_stop_checkpoints_the_whole_pack_at_whole_steps(
    trainer: Callable[[str], Trainer], trial: Trials, tmp_path: Path
) -> None:
    pack = [trial("first"), trial("second", gradient_accumulation_steps=1, micro_batch_size=6)]
    first, second = trainer("a").run(pack, None, _stop_after(4))
    assert (first.step, second.step) == (2, 4)  # the first sums up to two passes for a step
    assert first.interrupted and second.interrupted
    newest = [newest_checkpoint(tmp_path / "a" / one.id) for one in pack]
    assert [checkpoint.step for checkpoint in newest if checkpoint] == [2, 4]


def test_resume_after_the_newest_checkpoint_is_damaged_gives_the_same_adapter(
    trainer: Callable[[str], Trainer], trial: Trials, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = _run(trainer("straight"), trial())
    _run(trainer("hurt"), trial(), 7)
    damaged = tmp_path / "hurt" / "t000" / "step-00000007" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    resumed = _run(trainer("hurt"), trial())
    assert "optimizer.safetensors has sha256" in caplog.text
    assert resumed.curve == straight.curve
    assert _equal(_weights(tmp_path / "hurt", trial()), _weights(tmp_path / "straight", trial()))


def test_a_finished_trial_is_only_scored_again(trainer: Callable[[str], Trainer], trial: Trials) -> None:
    first = _run(trainer("a"), trial())
    again = _run(trainer("a"), trial(), 3)
    assert (again.step, again.curve, again.validation_loss) == (8, first.curve, first.validation_loss)
    assert again.seconds == first.seconds


def test_a_trial_does_not_depend_on_what_ran_before(
    trainer: Callable[[str], Trainer], trial: Trials, tmp_path: Path
) -> None:
    alone = _run(trainer("alone"), trial("mine"))
    again = trainer("again")
    torch.manual_seed(99)
    again.run([trial("x", lora_rank=16, learning_rate=1e-2, seed=1), trial("y", micro_batch_size=1)], None)
    assert _run(again, trial("mine")).curve == alone.curve
    assert _equal(_weights(tmp_path / "again", trial("mine")), _weights(tmp_path / "alone", trial("mine")))


def test_the_seed_matters(trainer: Callable[[str], Trainer], trial: Trials) -> None:
    curves = [_run(trainer(f"{seed}"), trial(seed=seed)).curve for seed in (1, 2)]
    assert curves[0] != curves[1]


def test_training_leaves_the_callers_generator_alone(trainer: Callable[[str], Trainer], trial: Trials) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    _run(trainer("a"), trial(max_steps=2))
    assert torch.equal(torch.rand(4), expected)


_VICTIM = """
import json, sys
from pathlib import Path
import torch
from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import TokenRow
from qlora_core.model.base import load_quantized
from qlora_core.training.trainer import PassLimits, Trainer
from qlora_core.training.trial import Trial
torch.set_num_threads(1)
job = json.loads(sys.stdin.read())
rows = {split: [TokenRow(*row) for row in job[split]] for split in ("train", "validation")}
trainer = Trainer(load_quantized(Path(job["base"])), rows["train"], rows["validation"], Path(job["work"]))
trainer.run([Trial("t000", TrainConfig(**job["params"]))], None)
"""


def test_kill_9_in_the_middle_of_training_changes_nothing(
    base: PreTrainedModel,
    nf4_folder: Path,
    train_rows: list[TokenRow],
    validation_rows: list[TokenRow],
    trial: Trials,
    tmp_path: Path,
) -> None:
    def plain(rows: Sequence[TokenRow]) -> list[list[Any]]:
        return [[row.id, row.input_ids, row.loss_mask] for row in rows]

    one = trial(max_steps=400, checkpoint_every_steps=1)
    job = {
        "base": str(nf4_folder),
        "work": str(tmp_path / "killed"),
        "train": plain(train_rows),
        "validation": plain(validation_rows),
        "params": one.params.model_dump(mode="json"),
    }
    victim = subprocess.Popen(
        [sys.executable, "-c", _VICTIM], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    )
    assert victim.stdin is not None
    victim.stdin.write(json.dumps(job))
    victim.stdin.close()
    folder = tmp_path / "killed" / "t000"
    deadline = time.monotonic() + 120
    while not list(folder.glob("step-0000001*")):
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL

    survived = newest_checkpoint(folder)
    assert survived is not None and 10 <= survived.step < 400
    until = survived.step + 4
    resumed = _run(Trainer(base, train_rows, validation_rows, tmp_path / "killed"), one, until)
    straight = _run(Trainer(base, train_rows, validation_rows, tmp_path / "straight"), one, until)
    assert resumed.curve == straight.curve
    assert resumed.validation_loss == straight.validation_loss
    assert _equal(_weights(tmp_path / "killed", one), _weights(tmp_path / "straight", one))


# --- guards


def test_a_weight_that_is_not_finite_stops_the_step_and_names_rows(
    nf4_folder: Path, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    base = load_quantized(nf4_folder)
    poisoned = 95
    with torch.no_grad():
        base.get_parameter("model.embed_tokens.weight")[poisoned] = float("nan")
    clean = [row for row in rows(60) if poisoned not in row.input_ids][:12]
    bad = TokenRow("the-bad-row", [1, poisoned, 3, 4], [False, False, True, True])
    trainer = Trainer(base, [*clean, bad], clean, tmp_path)
    one = trial(max_steps=9, checkpoint_every_steps=1, micro_batch_size=2, gradient_accumulation_steps=1)
    (progress,) = trainer.run([one], None)
    assert re.search(r"the loss of step \d+ is nan on rows .*the-bad-row", progress.recoveries[0]["cause"])
    newest = newest_checkpoint(tmp_path / "t000")
    if newest is not None:
        assert all(torch.isfinite(tensor).all() for tensor in newest.adapter().values())
    # The same rows train where the bad one is left out, so it was this row and nothing else
    assert Trainer(base, clean, clean, tmp_path / "clean").run([one], None)[0].step == 9


def test_gradients_that_are_not_finite_stop_the_step(
    trainer: Callable[[str], Trainer], trial: Trials, base: PreTrainedModel, tmp_path: Path
) -> None:
    # A finite loss with an overflow on the way back: the kind a loss guard alone lets through
    handle = base.get_submodule("lm_head").register_full_backward_hook(
        lambda module, inputs, outputs: (inputs[0] * float("inf"),)
    )
    try:
        assert re.search(
            r"the gradient norm of step 1 is (nan|inf) at learning rate", _error(trainer("a"), trial(max_steps=3))
        )
    finally:
        handle.remove()
    newest = newest_checkpoint(tmp_path / "a" / "t000")
    assert newest is not None and newest.step == 0  # the roll-backs, and no step
    assert _run(trainer("b"), trial()).step == 8


def test_gradients_are_clipped_to_the_setting(trainer: Callable[[str], Trainer], trial: Trials) -> None:
    clipped = _run(trainer("a"), trial(max_grad_norm=1e-9, learning_rate=1e-3, lora_dropout=0.0))
    free = _run(trainer("b"), trial(max_grad_norm=1e9, learning_rate=1e-3, lora_dropout=0.0))
    assert clipped.curve[0] == free.curve[0]  # the recorded norm is the one before clipping
    # AdamW's step is insensitive to scale except against its epsilon of 1e-8, which a norm of 1e-9 falls under
    assert clipped.curve[-1]["loss"] > free.curve[-1]["loss"]


# --- refusals before a step


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], r"train split has 0 rows"),
        ([TokenRow("r", [1, 2], [True, False])], r"labels are masked in all 1 rows of the train split \(first: 'r'\)"),
        ([TokenRow("r", [1] * 49, [True] * 49)], r"train row 'r' has 49 tokens, more than the base model's 48 pos"),
        ([TokenRow("r", [1, 96], [True, True])], r"train row 'r' holds token ids 1 to 96, .* vocabulary is 0 to 95"),
        ([TokenRow("r", [1, -1], [True, True])], r"token ids -1 to 1"),
        ([TokenRow("r", [1, 2], [True, True, True])], r"'r' has 2 tokens but a loss mask of 3"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(
    base: PreTrainedModel, rows: Rows, tmp_path: Path, bad: list[TokenRow], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        Trainer(base, bad, rows(2), tmp_path)
    with pytest.raises(TrainingError, match=message.replace("train", "validation")):
        Trainer(base, rows(2), bad, tmp_path)


def test_rows_without_a_label_are_left_out_and_counted(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mute = TokenRow("mute", [1, 2, 3], [True, False, False])
    good = rows(6)
    with_mute = Trainer(base, [good[0], mute, *good[1:]], good, tmp_path / "a").run([trial()], None)[0]
    assert "1 of 7 train rows have no trained token" in caplog.text and "mute" in caplog.text
    assert with_mute.curve == Trainer(base, good, good, tmp_path / "b").run([trial()], None)[0].curve


def test_a_row_as_long_as_the_positions_is_trained(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    longest = rows(3, shortest=48, longest=48)
    assert Trainer(base, longest, longest, tmp_path).run([trial(max_steps=2)], None)[0].step == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"learning_rate": 1e-3}, "learning_rate is 0.005 there and 0.001 here"), ({"lora_rank": 8}, "lora_rank is 4")],
)
def test_a_checkpoint_of_other_settings_is_refused(
    trainer: Callable[[str], Trainer], trial: Trials, changed: dict[str, Any], message: str
) -> None:
    _run(trainer("a"), trial(), 2)
    assert message in _error(trainer("a"), trial(**changed))


def test_a_checkpoint_of_other_data_or_another_base_is_refused(
    trainer: Callable[[str], Trainer], trial: Trials, nf4_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    _run(trainer("a"), trial(), 2)
    others = Trainer(load_quantized(nf4_folder), rows(26, seed=77), rows(2), tmp_path / "a")
    assert "belongs to another training: training data is" in _error(others, trial())
    other = load_quantized(nf4_folder)
    with torch.no_grad():
        other.get_parameter("model.norm.weight")[0] += 0.5
    train = rows(26, seed=1)
    others = Trainer(other, train, rows(2), tmp_path / "a")
    assert "belongs to another training: base model is" in _error(others, trial())


def test_checkpoint_interval_may_change_between_segments(trainer: Callable[[str], Trainer], trial: Trials) -> None:
    straight = _run(trainer("a"), trial())
    _run(trainer("b"), trial(checkpoint_every_steps=1), 4)
    assert _run(trainer("b"), trial(checkpoint_every_steps=50)).curve == straight.curve


def test_a_base_in_another_precision_than_asked_for_is_refused(
    trainer: Callable[[str], Trainer], trial: Trials
) -> None:
    message = _error(trainer("a"), trial(precision="bfloat16"))
    assert "precision bfloat16, but the base is loaded in torch.float32" in message


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_trial_ids_that_cannot_name_a_folder_are_refused(trial: Trials, name: str) -> None:
    with pytest.raises(TrainingError, match="cannot name a folder"):
        trial(name)


def test_impossible_calls_are_refused(trainer: Callable[[str], Trainer], trial: Trials) -> None:
    with pytest.raises(TrainingError, match="not unique"):
        trainer("a").run([trial("x"), trial("x")], None)
    with pytest.raises(TrainingError, match="until_step is 0"):
        trainer("a").run([trial()], 0)


def test_limits_of_memory_change_how_a_trial_is_computed_and_not_what_comes_out(
    base: PreTrainedModel, train_rows: list[TokenRow], validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> None:
    wide = Trainer(base, train_rows, validation_rows, tmp_path / "wide")
    tight = Trainer(
        base, train_rows, validation_rows, tmp_path / "tight", limits=PassLimits(recompute=True, most_rows=1)
    )
    one = trial(lora_dropout=0.3)
    expected, found = _run(wide, one), _run(tight, one)
    assert (expected.micro_batch_size, found.micro_batch_size) == (3, 1)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(expected.curve, found.curve, strict=True)) < 1e-5
    assert [entry["tokens"] for entry in expected.curve] == [entry["tokens"] for entry in found.curve]
