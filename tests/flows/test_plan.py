"""`qlora plan` as a user sees it: the table of memory, the choice, and JSON with all of it."""

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import app


def test_plan_shows_memory_and_json_holds_its_parts(tiny_project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = CliRunner().invoke(app, ["plan", str(tiny_project)])
    assert shown.exit_code == 0
    for line in ("memory of a worker, MiB", "activation", "runs dense, without gradient checkpointing"):
        assert line in shown.output
    assert CliRunner().invoke(app, ["plan", str(tiny_project), "--json"]).exit_code == 0
    planned = json.loads(capfd.readouterr().out)
    memory = planned["memory"]
    assert planned["sweep"]["trials"] == len(planned["trials"])
    assert planned["sweep"]["worker_seconds"] is None and "curate" in planned["sweep"]["note"]
    kept = {"quantized_base_bytes", "adapter_bytes", "optimizer_bytes", "logits_bytes", "floor_bytes"}
    gained = {
        "training", "validation", "residency", "gradient_checkpointing", "micro_batch_size", "peak_bytes",
        "available_bytes", "fits", "reasons",
    }  # fmt: skip
    assert kept | gained <= memory.keys()
    assert memory["fits"]
    assert memory["peak_bytes"] == max(sum(memory[part].values()) for part in ("training", "validation"))
    assert memory["floor_bytes"] < memory["peak_bytes"]


def test_plan_of_a_job_that_cannot_fit_names_a_remedy(tiny_project: Path) -> None:
    changes = ["--set", "train.micro_batch_size=1000000007", "--set", "compute.residency=scratch"]
    shown = CliRunner().invoke(app, ["plan", str(tiny_project), *changes])
    assert shown.exit_code == 0
    assert "could run scratch, without gradient checkpointing, micro-batches of 1 x 1000000007" in shown.output
    assert "set train.micro_batch_size: 1 with train.gradient_accumulation_steps: 1000000007" in shown.output


def test_plan_prices_the_sweep_once_its_data_is_there(tiny_project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from qlora_core.config.load import load_config
    from qlora_core.pipeline.pipeline import Pipeline
    from qlora_core.sweep.speed import note_speed, speed_key
    from qlora_core.training.memory.machine import local_device
    from qlora_core.training.memory.shapes import read_shapes

    job = Pipeline(load_config(tiny_project))
    job.run("curate")
    base = job.job.external_base
    assert base is not None
    priced = ["plan", str(tiny_project), "--json", "--set", "compute.price_per_gpu_hour=3600"]

    assert CliRunner().invoke(app, priced).exit_code == 0
    first = json.loads(capfd.readouterr().out)["sweep"]
    assert first["steps"] > 0 and first["tokens"] > first["steps"]
    assert first["worker_seconds"] == pytest.approx(first["tokens"] * first["seconds_per_token"], abs=0.06)
    assert "estimated" in first["basis"] or "not known" in first["basis"]

    folder = job.job.config.work_dir / "sweeps"
    folder.mkdir(parents=True)
    note_speed(folder, speed_key(read_shapes(base.folder).parameters, local_device()[0]), 50.0, 1000)
    assert CliRunner().invoke(app, priced).exit_code == 0
    second = json.loads(capfd.readouterr().out)["sweep"]
    assert (second["steps"], second["tokens"]) == (first["steps"], first["tokens"])
    assert second["seconds_per_token"] == 0.05 and "measured" in second["basis"]
    # At 3600 an hour, a worker-second costs 1.
    assert second["cost"] == pytest.approx(second["tokens"] * 0.05, rel=1e-3)


@pytest.mark.parametrize(("cores", "given", "workers"), [(1, "null", 1), (3, "null", 3), (64, "null", 4), (1, "2", 2)])
def test_plan_counts_the_workers_that_a_run_would_start(
    tiny_project: Path, monkeypatch: pytest.MonkeyPatch, cores: int, given: str, workers: int
) -> None:
    from qlora_core.config.load import load_config
    from qlora_core.pipeline.pipeline import Pipeline
    from qlora_core.pipeline.sweep_estimate import started_workers

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    changes = [f"compute.workers={given}", "compute.gpus=none", "sweep.method=random", "sweep.trials=9"]
    assert started_workers(Pipeline(load_config(tiny_project, changes))) == workers


def test_a_stored_evaluation_asks_no_judge(tiny_project: Path) -> None:
    from qlora_core.config.load import load_config
    from qlora_core.pipeline.estimate import estimate_judge

    config = load_config(tiny_project, ["evaluate.judge.kind=offline"])
    assert estimate_judge(config)["calls"] == 2 * config.evaluate.max_prompts
    assert estimate_judge(config, evaluated=True)["calls"] == 0


def test_version_is_told() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output == f"qlora-fleet {version('qlora-fleet')}\n"
