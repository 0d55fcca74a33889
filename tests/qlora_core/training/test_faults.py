"""Roll-backs, memory that runs out, and trials that fail alone: faults injected for real, with a control each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.model.base import load_quantized
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.pack.layout import Part
from qlora_core.training.pack.pack import Pack
from qlora_core.training.schedule import learning_rate
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial

Rows = Callable[..., list[TokenRow]]
Trials = Callable[..., Trial]
POISONED = 95


@pytest.fixture
def poisoned(nf4_folder: Path) -> PreTrainedModel:
    """A base one of whose tokens gives NaN."""
    base = load_quantized(nf4_folder)
    with torch.no_grad():
        base.get_parameter("model.embed_tokens.weight")[POISONED] = float("nan")
    return base


def _clean(rows: Rows, count: int) -> list[TokenRow]:
    return [row for row in rows(4 * count) if POISONED not in row.input_ids][:count]


def test_a_batch_that_gives_nan_is_rolled_back_skipped_and_trained_past_at_half_the_rate(
    poisoned: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    clean = _clean(rows, 23)
    bad = TokenRow("the-bad-row", [1, POISONED, 3, 4], [False, False, True, True])
    one = trial(max_steps=12, micro_batch_size=2, gradient_accumulation_steps=1, checkpoint_every_steps=2)
    (progress,) = Trainer(poisoned, [*clean, bad], clean[:4], tmp_path / "hurt").run([one], None)
    assert progress.error is None and progress.step == 12
    (recovery,) = progress.recoveries
    assert "the-bad-row" in recovery["cause"] and recovery["back_to"] == (recovery["step"] - 1) // 2 * 2
    assert recovery["skipped_batches"] == recovery["step"] - recovery["back_to"]
    rates = [learning_rate(one.params, step, 12) for step in range(12)]
    back = recovery["back_to"]
    found = [entry["learning_rate"] for entry in progress.curve]
    assert found == rates[:back] + [rate / 2 for rate in rates[back:]]
    # control: without the row nothing is rolled back
    (control,) = Trainer(poisoned, clean, clean[:4], tmp_path / "clean").run([one], None)
    assert control.recoveries == []


def test_a_recovery_outlives_the_process(poisoned: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path) -> None:
    clean = _clean(rows, 23)
    bad = TokenRow("the-bad-row", [1, POISONED, 3, 4], [False, False, True, True])
    one = trial(max_steps=12, micro_batch_size=2, gradient_accumulation_steps=1, checkpoint_every_steps=2)
    straight = Trainer(poisoned, [*clean, bad], clean[:4], tmp_path / "straight").run([one], None)[0]
    met = straight.recoveries[0]["step"]
    trainer = Trainer(poisoned, [*clean, bad], clean[:4], tmp_path / "parts")
    for until in (max(1, met - 1), met, None):
        (progress,) = trainer.run([one], until)
    assert progress.recoveries == straight.recoveries
    assert progress.curve == straight.curve


def test_a_trial_that_stays_sick_fails_alone_after_two_roll_backs(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    # Losses that hardly move and a factor of nearly 1: every other step counts as a jump
    pair = [trial("sick", learning_rate=1e-7, max_steps=60, spike_factor=1.0001), trial("well")]
    sick, well = Trainer(base, rows(26, seed=1), rows(4), tmp_path / "pair").run(pair, None)
    assert sick.error is not None and len(sick.recoveries) == 2 and sick.validation_loss is None
    assert well.error is None and well.step == 8
    (alone,) = Trainer(base, rows(26, seed=1), rows(4), tmp_path / "alone").run([trial("well")], None)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(well.curve, alone.curve, strict=True)) < 5e-5


class _SmallMemory:
    """Passes of more than so many rows end as torch ends them when memory runs out, half their gradients written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most_rows: int) -> None:
        self.refused: list[int] = []
        real = Pack.backward

        def backward(pack: Pack, parts: list[Part], counts: list[int], **settings: Any) -> torch.Tensor:
            rows = sum(len(part.rows) for part in parts)
            if rows > most_rows:
                self.refused.append(rows)
                real(pack, parts[:1], counts[:1], **settings)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(pack, parts, counts, **settings)

        monkeypatch.setattr(Pack, "backward", backward)


def test_out_of_memory_halves_what_is_computed_at_once_and_keeps_the_curve(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = [trial("a", micro_batch_size=6, gradient_accumulation_steps=1), trial("b", seed=8)]
    data = (rows(26, seed=1), rows(4))
    roomy = Trainer(base, *data, tmp_path / "roomy").run(pack, None)
    memory = _SmallMemory(monkeypatch, most_rows=3)
    tight = Trainer(base, *data, tmp_path / "tight").run(pack, None)
    assert memory.refused[0] > 6 and 6 in memory.refused
    assert [progress.micro_batch_size for progress in tight] == [3, 3]
    for one, other in zip(roomy, tight, strict=True):
        assert other.error is None and [entry["tokens"] for entry in one.curve] == [e["tokens"] for e in other.curve]
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one.curve, other.curve, strict=True)) < 1e-5


def test_memory_that_does_not_suffice_for_one_row_fails_the_trial(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _SmallMemory(monkeypatch, most_rows=0)
    (progress,) = Trainer(base, rows(6), rows(2), tmp_path).run([trial()], None)
    assert progress.error is not None and "does not suffice for one row of trial t000" in progress.error
    assert newest_checkpoint(tmp_path / "t000") is None


def test_the_best_checkpoint_is_kept_beside_the_newest_two(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    one = Trial("t000", trial(max_steps=8, checkpoint_every_steps=1).params, {2: 0.5, 4: 0.9})
    Trainer(base, rows(26, seed=1), rows(2), tmp_path).run([one], None)
    assert sorted(path.name for path in (tmp_path / "t000").iterdir() if path.is_dir()) == [
        "step-00000002", "step-00000007", "step-00000008",
    ]  # fmt: skip
