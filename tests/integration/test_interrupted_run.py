"""Ctrl-C in each stage leaves nothing half-written, and the same command then goes on to the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
QLORA = str(Path(sys.executable).parent / "qlora")
STAGES = ("curate", "quantize", "sweep", "evaluate")


def interrupt_when(config: Path, env: dict[str, str], marker: str, log: Path) -> int:
    """Start the run, press Ctrl-C once `marker` is in its log, and return its exit code."""
    with log.open("wb") as stream:
        process = subprocess.Popen([QLORA, "run", str(config)], env=env, stdout=stream, stderr=stream)
        deadline = time.monotonic() + 240
        while marker not in log.read_text(errors="replace"):
            assert process.poll() is None, f"ended before {marker!r}: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"never came to {marker!r}: {log.read_text()[-2000:]}"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=120)


def stages_in(store: Path) -> set[str]:
    return {path.parent.parent.name for path in store.glob("v1/stage/*/*/manifest.json")}


def test_ctrl_c_in_each_stage_then_the_same_command_finishes(
    tiny_project: Path, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    store = tiny_project.parent / ".qlora"
    for number, stage in enumerate(STAGES):
        log = tmp_path / f"{stage}.log"
        code = interrupt_when(tiny_project, prefect_server, f"{stage}: started", log)
        assert code == 1, log.read_text()[-2000:]
        assert "the same command goes on" in log.read_text()
        assert stages_in(store) == set(STAGES[:number]), "an interrupted stage must not be visible"
    done = subprocess.run(
        [QLORA, "run", str(tiny_project), "--json"], env=prefect_server, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert {row["name"]: row["cached"] for row in summary["stages"]}["sweep"] is True
    assert summary["model_version"] == "1"


def test_killed_run_is_finished_by_the_same_command(
    tiny_project: Path, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "killed.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [QLORA, "sweep", str(tiny_project)],
            env=prefect_server,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        while "sweep: started" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert stages_in(tiny_project.parent / ".qlora") == {"curate", "quantize"}
    done = subprocess.run(
        [QLORA, "sweep", str(tiny_project), "--json"], env=prefect_server, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["best"]
