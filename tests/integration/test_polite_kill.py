"""A polite kill in the middle of training: the step under way is finished and checkpointed, within five seconds."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
QLORA = str(Path(sys.executable).parent / "qlora")
LONG = ["train.max_steps=50000", "train.checkpoint_every_steps=50000", "sweep.pruning.enabled=false"]
WITHIN_S = 5.0


def _steps(store: Path) -> dict[str, int]:
    """The last step of each trial that its diary knows."""
    lines = {path.parent.name: path.read_text().splitlines() for path in store.glob("sweeps/*/trials/*/steps.jsonl")}
    return {trial: json.loads(found[-1])["step"] for trial, found in lines.items() if found}


def _checkpoints(store: Path) -> dict[str, int]:
    states = [path.parent for path in store.glob("sweeps/*/trials/*/*/adapter.safetensors")]
    return {folder.parent.name: int(folder.name.rsplit("-", 1)[-1]) for folder in states}


def test_a_polite_kill_writes_a_checkpoint_of_the_step_under_way(
    tiny_project: Path, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    store, log = tiny_project.parent / ".qlora", tmp_path / "sweep.log"
    settings = [part for setting in LONG for part in ("--set", setting)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [QLORA, "sweep", str(tiny_project), *settings], env=prefect_server, stdout=stream, stderr=stream
        )
        deadline = time.monotonic() + 200
        while not _steps(store) or min(_steps(store).values()) < 20:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        assert not _checkpoints(store), "nothing but the kill may write a checkpoint here"
        reached = _steps(store)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        while _checkpoints(store).keys() < reached.keys():
            assert time.monotonic() < sent + WITHIN_S, (reached, _checkpoints(store), log.read_text()[-3000:])
            time.sleep(0.05)
        assert process.wait(timeout=60) == 1, log.read_text()[-3000:]
    saved = _checkpoints(store)
    assert all(saved[trial] >= step for trial, step in reached.items()), (reached, saved)
    assert saved == _steps(store), "the checkpoint is of the last step that was trained"
