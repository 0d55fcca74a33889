"""A whole sweep with the real trainer over a tiny NF4 Llama: result, killed worker, refusals."""

import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.sweep import WITHOUT_EFFECT, PruningConfig, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import DataError, SweepError
from qlora_core.sweep.run import SweepWork, run_sweep

TRAIN = TrainConfig(
    lora_rank=4,
    lora_dropout=0.0,
    max_steps=8,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    optimizer="adamw",
    checkpoint_every_steps=1,
)
SWEEP = SweepConfig(space={"learning_rate": [1e-6, 5e-3]})
ONE_WORKER = ComputeConfig(workers=1)
LINEAGE = {
    "base_revision": "none",
    "quantized_base_digest": "q" * 64,
    "data_digest": "d" * 64,
    "chat_template_origin": "tokenizer",
}


def work_in(folder: Path, quantized: Path, curated: Path) -> SweepWork:
    return SweepWork(quantized, curated, folder / "work", LINEAGE)


def alone(quantized: Path, curated: Path, folder: Path, params: dict[str, Any]) -> float:
    """Final validation loss of the same trial trained in this process in one go."""
    import torch

    from qlora_core.data.dataset import read_split
    from qlora_core.model.base import load_quantized
    from qlora_core.training.trainer import Trainer
    from qlora_core.training.trial import Trial

    torch.set_num_threads(1)
    train, validation = read_split(curated, "train"), read_split(curated, "validation")
    trainer = Trainer(load_quantized(quantized), train, validation, folder)
    (progress,) = trainer.run([Trial("t000", TrainConfig(**params))], None)
    if progress.validation_loss is None:
        raise AssertionError(f"trial ended without a loss: {progress}")
    return progress.validation_loss


def test_sweep_with_a_killed_worker_ends_as_the_trial_alone(
    local_ray: None, quantized: Path, curated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qlora_core.sweep.cluster")
    rows: list[dict[str, Any]] = []
    killed: list[int] = []

    def kill_the_first_worker(row: dict[str, Any]) -> None:
        rows.append(row)
        ready = re.findall(r"is ready \(.*pid (\d+)", caplog.text)
        if row["steps"] and ready and not killed:
            killed.append(int(ready[0]))
            os.kill(killed[0], signal.SIGKILL)

    out = tmp_path / "out"
    out.mkdir()
    work = work_in(tmp_path, quantized, curated)
    summary = run_sweep(SWEEP, TRAIN, ONE_WORKER, work, out, kill_the_first_worker)

    assert summary == json.loads((out / "sweep.json").read_text())
    assert {row["params"]["learning_rate"]: row["state"] for row in summary["trials"]} == {
        1e-6: "pruned",
        5e-3: "complete",
    }
    (best,) = [row for row in summary["trials"] if row["id"] == summary["best"]]
    assert sum(row["deaths"] for row in summary["trials"]) == 1  # the other trial of the pack was pruned by then
    assert abs(best["loss"] - alone(quantized, curated, tmp_path / "alone", best["params"])) < 5e-5
    assert {row["id"]: row for row in rows} == {row["id"]: row for row in summary["trials"]}
    card = json.loads((out / "adapter" / "qlora.json").read_text())
    assert card == {**LINEAGE, "params": best["params"], "precision": "float32"}
    names = {path.name for path in (out / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "golden.json", "golden.safetensors"}
    assert (out / "adapter" / "chat_template.jinja").read_text() == "the chat_template.jinja"


def test_the_best_candidates_are_exported_and_what_is_damaged_or_missing_is_written_anew(
    local_ray: None, quantized: Path, curated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = SweepConfig(space={"learning_rate": [1e-3, 5e-3, 1e-2]}, pruning=PruningConfig(enabled=False), candidates=5)
    out, work = tmp_path / "out", work_in(tmp_path, quantized, curated)
    out.mkdir()
    export = work.work_dir / "export"
    first = run_sweep(sweep, TRAIN.model_copy(update={"max_steps": 4}), ONE_WORKER, work, out)
    losses = {row["id"]: row["loss"] for row in first["trials"]}
    assert first["candidates"] == sorted(losses, key=lambda trial: losses[trial])
    assert first["best"] == first["candidates"][0]
    assert "3 of 5 candidates" in caplog.text
    written = {path.name: path for path in (out / "adapters").iterdir()}
    assert set(written) == set(losses)
    weights = {trial: (path / "adapter_model.safetensors").read_bytes() for trial, path in written.items()}
    assert len(set(weights.values())) == 3
    assert weights[first["best"]] == (out / "adapter" / "adapter_model.safetensors").read_bytes()
    for row in first["trials"]:
        card = json.loads((written[row["id"]] / "qlora.json").read_text())
        assert card["params"] == row["params"]
        assert (written[row["id"]] / "chat_template.jinja").is_file()

    shutil.rmtree(out)
    out.mkdir()
    (export / first["candidates"][1] / "adapter_model.safetensors").write_bytes(b"half")
    shutil.rmtree(export / first["candidates"][2])
    again = run_sweep(sweep, TRAIN.model_copy(update={"max_steps": 4}), ONE_WORKER, work, out)
    assert again["candidates"] == first["candidates"]
    for trial, kept in weights.items():
        assert (out / "adapters" / trial / "adapter_model.safetensors").read_bytes() == kept


def test_a_candidate_that_cannot_be_exported_is_told_and_the_best_still_counts(
    local_ray: None, quantized: Path, curated: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", work_in(tmp_path, quantized, curated)
    out.mkdir()
    sweep = SweepConfig(space={"learning_rate": [1e-3, 5e-3]}, pruning=PruningConfig(enabled=False), candidates=2)
    lost: list[str] = []

    def lose_the_first(row: dict[str, Any]) -> None:
        """Once both trials are complete, the checkpoints of the one with the higher loss go."""
        rows[row["id"]] = row
        if not lost and len(rows) == 2 and all(known["state"] == "complete" for known in rows.values()):
            lost.append(max(rows, key=lambda trial: rows[trial]["loss"]))
            shutil.rmtree(work.trials_dir / lost[0])

    rows: dict[str, dict[str, Any]] = {}
    summary = run_sweep(sweep, TRAIN.model_copy(update={"max_steps": 2}), ONE_WORKER, work, out, lose_the_first)
    assert summary["candidates"] == [summary["best"]]
    assert summary["best"] not in lost
    assert not (out / "adapters").exists()
    (error,) = [row["error"] for row in summary["trials"] if row["id"] == lost[0]]
    assert re.search(rf"^no candidate: .*{lost[0]}.*has no checkpoint", error)


def test_when_no_trial_finishes_every_error_is_listed_and_the_next_call_tries_again(
    local_ray: None, quantized: Path, curated: Path, tmp_path: Path
) -> None:
    work = work_in(tmp_path, quantized, curated)
    out = tmp_path / "out"
    out.mkdir()
    sweep = SweepConfig(space={"lora_rank": [0, 5000]})
    for _ in range(2):
        with pytest.raises(SweepError, match=r"none of 2 trials finished: t000: .*lora_rank.*; t001: .*lora_rank"):
            run_sweep(sweep, TRAIN, ONE_WORKER, work, out)
    assert list(out.iterdir()) == []


def test_another_sweep_in_the_same_folder_is_refused(
    local_ray: None, quantized: Path, curated: Path, tmp_path: Path
) -> None:
    from qlora_core.sweep.study import open_study

    work = work_in(tmp_path, quantized, curated)
    identity = {"sweep": SWEEP.model_dump(mode="json", exclude=set(WITHOUT_EFFECT)), "data": "d" * 64}
    with open_study(work.study_file, SWEEP, TRAIN, identity):
        pass
    with pytest.raises(SweepError, match=r"holds another sweep \(different: quantized base, train\)"):
        run_sweep(SWEEP, TRAIN, ONE_WORKER, work, tmp_path / "out")


def test_a_broken_study_file_is_named(local_ray: None, quantized: Path, curated: Path, tmp_path: Path) -> None:
    work = work_in(tmp_path, quantized, curated)
    work.work_dir.mkdir()
    work.study_file.write_bytes(b"not SQLite" * 200)
    with pytest.raises(SweepError, match=r"cannot open the study .*study\.db"):
        run_sweep(SWEEP, TRAIN, ONE_WORKER, work, tmp_path / "out")


def test_a_missing_training_split_is_named(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.*is no split of a curated set"):
        run_sweep(SWEEP, TRAIN, ONE_WORKER, work_in(tmp_path, quantized, tmp_path), tmp_path / "out")


def test_the_plans_smaller_micro_batches_reach_the_workers(
    local_ray: None, quantized: Path, curated: Path, tmp_path: Path
) -> None:
    # More rows than memory could ever hold; the plan takes a divisor of them that fits
    wide = TRAIN.model_copy(update={"micro_batch_size": 2**40, "gradient_accumulation_steps": 1, "max_steps": 1})
    (tmp_path / "out").mkdir()
    work = work_in(tmp_path, quantized, curated)
    summary = run_sweep(SweepConfig(), wide, ONE_WORKER, work, tmp_path / "out")
    (row,) = summary["trials"]
    assert row["state"] == "complete"
    assert row["micro_batch_size"] == summary["memory"]["micro_batch_size"] < 2**40
