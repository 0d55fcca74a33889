"""`qlora plan` as a user sees it: the table of memory, the choice, and JSON with all of it."""

import json
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
    memory = json.loads(capfd.readouterr().out)["memory"]
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
