"""The diary of steps: one line a step, rates that are the trial's own, and a disk that refuses stops nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.step_log import STEP_LOG
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / STEP_LOG).read_text().splitlines()]


def test_every_step_of_every_trial_is_written_down(
    base: PreTrainedModel,
    train_rows: list[TokenRow],
    validation_rows: list[TokenRow],
    trial: Callable[..., Trial],
    tmp_path: Path,
) -> None:
    trials = [
        trial("small", max_steps=4, lora_rank=4, optimizer="adamw"),
        trial("large", max_steps=3, lora_rank=8, optimizer="adamw"),
    ]
    trainer = Trainer(base, train_rows, validation_rows, tmp_path)
    first = trainer.run(trials, 2)
    done = trainer.run(trials, None)
    for progress, one, steps in zip(done, trials, (4, 3), strict=True):
        lines = _lines(tmp_path / one.id)
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        for line, entry in zip(lines, progress.curve, strict=True):
            assert {name: line[name] for name in entry} == entry
            assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"], rel=0.01)
        assert sum(line["seconds"] for line in lines) <= progress.seconds + 1e-3
    assert [line["pack"] for line in _lines(tmp_path / "small")] == [2, 2, 2, 1]
    assert all(line["process_memory_bytes"] > 10_000_000 for line in _lines(tmp_path / "small"))
    assert first[0].step == 2
    # float32 values, gradients, and AdamW's two moments with a step counter for each of the buffers A and B
    for one in trials:
        newest = newest_checkpoint(tmp_path / one.id)
        assert newest is not None
        values = sum(tensor.numel() * 4 for tensor in newest.adapter().values())
        assert {line["memory_bytes"] for line in _lines(tmp_path / one.id)} == {4 * values + 2 * 4}


def test_a_disk_that_refuses_the_diary_is_told_once_and_stops_nothing(
    base: PreTrainedModel,
    train_rows: list[TokenRow],
    validation_rows: list[TokenRow],
    trial: Callable[..., Trial],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = trial(max_steps=3)
    (tmp_path / one.id / STEP_LOG).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        (progress,) = Trainer(base, train_rows, validation_rows, tmp_path).run([one], None)
    assert progress.error is None and progress.step == 3
    assert [STEP_LOG in record.getMessage() for record in caplog.records].count(True) == 1
