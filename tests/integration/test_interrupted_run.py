"""Ctrl-C, kill and kill -9 leave nothing half-written, and the same command then goes on to the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
QLORA = str(Path(sys.executable).parent / "qlora")
# What is in the log when the run is hit, and with what. A blow during an import lands when the import ends.
MOMENTS = [
    ("curate: started", signal.SIGINT),
    ("quantize: started", signal.SIGTERM),
    ("goes to worker", signal.SIGKILL),
    ("evaluate: started", signal.SIGINT),
    ("register: started", signal.SIGINT),
]


def hit_when(config: Path, env: dict[str, str], marker: str, blow: signal.Signals, log: Path) -> int:
    """Start the run, send it `blow` once `marker` is in its log, and return its exit code.

    Ctrl-C goes to all that the run has started, as a terminal sends it.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [QLORA, "run", str(config)], env=env, stdout=stream, stderr=stream, start_new_session=True
        )
        deadline = time.monotonic() + 240
        while marker not in log.read_text(errors="replace"):
            assert process.poll() is None, f"ended before {marker!r}: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"never came to {marker!r}: {log.read_text()[-2000:]}"
            time.sleep(0.05)
        if blow == signal.SIGINT:
            os.killpg(process.pid, blow)
        else:
            process.send_signal(blow)
        return process.wait(timeout=120)


def stages_in(store: Path) -> set[str]:
    return {path.parent.parent.name for path in store.glob("v1/stage/*/*/manifest.json")}


def test_run_hit_in_each_stage_is_finished_by_the_same_command(
    tiny_project: Path, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    store = tiny_project.parent / ".qlora"
    # With Prefect's temporary server, which is one of the processes that hear the terminal, and with one of its own.
    alone = {name: value for name, value in prefect_server.items() if name != "PREFECT_API_URL"}
    for number, (marker, blow) in enumerate(MOMENTS):
        log = tmp_path / f"{number}.log"
        code = hit_when(tiny_project, alone if marker == "evaluate: started" else prefect_server, marker, blow, log)
        if blow == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 1, log.read_text()[-2000:]
            assert "the same command goes on" in log.read_text()
        *_, last = re.findall(r"^(\w+): started", log.read_text(), flags=re.MULTILINE)
        assert last not in stages_in(store), "an interrupted stage must not be visible"
    done = subprocess.run(
        [QLORA, "run", str(tiny_project), "--json"], env=prefect_server, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert {row["name"]: row["cached"] for row in summary["stages"]}["sweep"] is True
    assert summary["model_version"] == "1"
    # The killed sweep had checkpoints here and in the store; they were for going on from, and that is done.
    assert not [path for path in (store / "v1" / "work").rglob("*") if path.is_file()]
    assert not [entry for entry in (store / "sweeps").iterdir() if entry.is_dir()]
