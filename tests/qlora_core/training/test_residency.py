"""Training and evaluation do not depend on how the base's 4-bit layers execute: on the CPU not by one bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_core.data.dataset import TokenRow
from qlora_core.model.base import load_quantized
from qlora_core.model.loss import sequence_losses
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial, TrialProgress

Trials = Callable[..., Trial]
WAYS = ["dense", "scratch", "bitsandbytes"]
Rows = list[TokenRow]


def run(nf4_folder: Path, work: Path, residency: str, one: Trial, rows: tuple[Rows, Rows]) -> TrialProgress:
    (progress,) = Trainer(load_quantized(nf4_folder, residency=residency), *rows, work).run([one], None)
    assert progress.error is None
    return progress


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trial_is_the_same_in_every_residency(
    nf4_folder: Path, tmp_path: Path, trial: Trials, train_rows: Rows, validation_rows: Rows, checkpointing: bool
) -> None:
    one = trial(gradient_checkpointing=checkpointing)
    rows = train_rows, validation_rows
    found = {way: run(nf4_folder, tmp_path / way, way, one, rows) for way in WAYS}
    curves = [[(entry["loss"], entry["grad_norm"]) for entry in progress.curve] for progress in found.values()]
    assert len(curves[0]) == 8
    assert curves[0] == curves[1] == curves[2]
    assert len({progress.validation_loss for progress in found.values()}) == 1
    adapters = []
    for way in WAYS:
        checkpoint = newest_checkpoint(tmp_path / way / one.id)
        assert checkpoint is not None
        adapters.append(checkpoint.adapter())
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[1][name]), name
        assert torch.equal(value, adapters[2][name]), name


def test_a_trial_may_go_on_in_another_residency(
    nf4_folder: Path, tmp_path: Path, trial: Trials, train_rows: Rows, validation_rows: Rows
) -> None:
    """A worker with less memory takes up what another one began."""
    straight = run(nf4_folder, tmp_path / "straight", "dense", trial(), (train_rows, validation_rows))
    for until_step, way in [(3, "dense"), (6, "scratch"), (None, "bitsandbytes")]:
        base = load_quantized(nf4_folder, residency=way)
        (progress,) = Trainer(base, train_rows, validation_rows, tmp_path / "moved").run([trial()], until_step)
    assert [entry["loss"] for entry in progress.curve] == [entry["loss"] for entry in straight.curve]
    assert progress.validation_loss == straight.validation_loss


def test_held_out_losses_are_the_same_in_every_residency(nf4_folder: Path, validation_rows: Rows) -> None:
    found = [sequence_losses(load_quantized(nf4_folder, residency=way), validation_rows, batch_size=3) for way in WAYS]
    assert found[0] == found[1] == found[2]
