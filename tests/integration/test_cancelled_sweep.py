"""A sweep that is cancelled in Prefect: its workers end, nothing is left behind, and the same sweep goes on."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LONG = ["train.max_steps=50000", "train.checkpoint_every_steps=20", "sweep.pruning.enabled=false", "compute.workers=1"]
Background = Callable[..., contextlib.AbstractContextManager["subprocess.Popen[bytes]"]]


def prefect(env: dict[str, str], *arguments: str) -> str:
    command = [str(BIN / "prefect"), "--no-prompt", *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def steps(store: Path) -> dict[str, int]:
    """The last step of each trial that its diary knows."""
    lines = {path.parent.name: path.read_text().splitlines() for path in store.glob("sweeps/*/trials/*/steps.jsonl")}
    return {trial: json.loads(found[-1])["step"] for trial, found in lines.items() if found}


def workers(config: Path) -> list[int]:
    """Living processes of Ray, its workers among them, whose environment says that they were begun for this config."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                alive = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
                command = (entry / "cmdline").read_text()
                ours = f"QLORA_CONFIG={config}".encode() in (entry / "environ").read_bytes().split(b"\0")
                if alive and ours and ("ray::" in command or "raylet" in command):
                    found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], Any], log: Path, what: str, within_s: float = 150.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {log.read_text()[-3000:]}"
        time.sleep(0.2)


def test_cancelled_in_prefect_the_workers_end_and_the_same_sweep_goes_on(
    tiny_project: Path, prefect_server: dict[str, str], background: Background, tmp_path: Path
) -> None:
    store, log = tiny_project.parent / ".qlora", tmp_path / "worker.log"
    env = {**prefect_server, "QLORA_CONFIG": str(tiny_project), "QLORA_POOL": "cancelling"}
    prefect(env, "work-pool", "create", "cancelling", "--type", "process")
    prefect(env, "deploy", "--name", "fleet", "--prefect-file", "deployments/prefect.yaml")
    with background([str(BIN / "prefect"), "worker", "start", "--pool", "cancelling"], env, log):
        told = prefect(env, "deployment", "run", "sweep/fleet", "-p", f"overrides={json.dumps(LONG)}")
        run = next(word for word in told.replace("/", " ").split() if word.count("-") == 4 and len(word) == 36)
        wait_for(lambda: steps(store) and min(steps(store).values()) > 40, log, "no trial got beyond step 40")
        assert workers(tiny_project), "the control: workers are seen while they work"
        prefect(env, "flow-run", "cancel", run)
        wait_for(lambda: not workers(tiny_project), log, "workers outlived the cancelled run")
        wait_for(lambda: "CANCELLED" in prefect(env, "flow-run", "inspect", run), log, "the run is not cancelled", 60.0)
    reached = steps(store)

    settings = [part for setting in LONG for part in ("--set", setting)]
    again = tmp_path / "again.log"
    with background([str(BIN / "qlora"), "sweep", str(tiny_project), *settings], env, again):
        wait_for(lambda: all(steps(store)[trial] >= step + 5 for trial, step in reached.items()), again, "no step more")
        assert "continuing the sweep" in again.read_text()
    for trial in reached:
        diary = next(store.glob(f"sweeps/*/trials/{trial}/steps.jsonl")).read_text().splitlines()
        taken = [json.loads(line)["step"] for line in diary]
        assert sorted(set(taken)) == list(range(1, max(taken) + 1))
        assert 1 not in taken[1:], "it began anew"
