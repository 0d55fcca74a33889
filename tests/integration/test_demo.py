"""The embedded default, as `make demo` runs it: a clearly better adapter, and a second run that has nothing to do."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
Qlora = Callable[..., "subprocess.CompletedProcess[str]"]


def test_demo_promotes_a_clearly_better_adapter_and_then_finds_all_stages_cached(
    tmp_path: Path, qlora: Qlora, prefect_server: dict[str, str]
) -> None:
    assert qlora("init", tmp_path / "demo").returncode == 0
    config = tmp_path / "demo" / "pipeline.yaml"
    first = qlora("run", config, "--json", env=prefect_server)
    assert first.returncode == 0, first.stderr[-3000:]
    summary = json.loads(first.stdout)
    assert (summary["verdict"], summary["model_version"]) == ("PROMOTE", "1")
    assert len(summary["trials"]) >= 4
    beside = {path.name for path in Path(summary["report"]).parent.iterdir()}
    assert {"worst_slices.json", "drift.json", "disagreements.html"} <= beside
    assert (Path(summary["base"]) / "config.json").is_file()
    assert (Path(summary["adapter"]) / "adapter_model.safetensors").is_file()
    assert "worker-1 is ready" in first.stderr
    heldout, exact = summary["metrics"]["heldout"], summary["metrics"]["exact_match"]
    assert heldout["gain_low"] > 1.0
    assert exact["low"] > 0.2
    assert exact["adapter"] > exact["base"] + 0.3

    # With Prefect switched off and no address to reach it at, anything that touched it would fail.
    alone = {**os.environ, "PREFECT_SERVER_EPHEMERAL_ENABLED": "false", "PREFECT_API_URL": ""}
    started = time.monotonic()
    second = qlora("run", config, "--json", env=alone)
    assert second.returncode == 0, second.stderr[-3000:]
    again = json.loads(second.stdout)
    assert all(stage["cached"] for stage in again["stages"])
    assert again["model_version"] == "1"
    assert (again["base"], again["adapter"]) == (summary["base"], summary["adapter"])
    assert time.monotonic() - started < 10
