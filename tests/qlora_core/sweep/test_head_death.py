"""The head of a Ray cluster is killed under a sweep: on a new cluster the same command goes on to the same result."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
RATES = [0.1, 0.2, 0.3, 0.4]
DEADLINE_S = 120.0
# Ray waits a minute for a head that is gone. What is tested is what comes after that, not the wait.
IMPATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
_LEFT_OUT = ("seconds", "deaths", "preemptions")
"""What may differ between equal sweeps."""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.1)


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in _LEFT_OUT} for row in rows]


def steps_of(work_dir: Path) -> list[str]:
    log = work_dir / "trials" / "steps.log"
    return log.read_text().splitlines() if log.exists() else []


def finished(loopback: Any, work_dir: Path, step_seconds: float, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    driver = loopback.drive(work_dir, step_seconds, settings)
    assert driver.wait(DEADLINE_S) == 0, (work_dir / "driver.log").read_text()[-3000:]
    return json.loads((work_dir / "rows.json").read_text())


def test_a_killed_head_ends_the_driver_and_the_same_command_goes_on(
    make_loopback: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"workers": 2, "rates": RATES}
    first = make_loopback(2, IMPATIENT)
    work_dir = tmp_path / "disturbed"
    driver = first.drive(work_dir, 0.5, settings)
    wait_for(lambda: len(steps_of(work_dir)) > 6, "a few steps")
    (head,) = [one for one in psutil.Process(first.process.pid).children(True) if "gcs_server" in one.name()]
    os.kill(head.pid, signal.SIGKILL)
    wait_for(lambda: driver.poll() is not None, "the end of the driver")
    assert driver.returncode != 0
    assert not (work_dir / "rows.json").exists()
    first.end()
    before = steps_of(work_dir)

    second = make_loopback(2)
    rows = finished(second, work_dir, 0.0, settings)
    undisturbed = finished(second, tmp_path / "undisturbed", 0.0, settings)
    assert shown(rows) == shown(undisturbed)
    steps = steps_of(work_dir)
    assert 6 < len(before) < len(steps)
    # A blow between a step and its checkpoint has that one taken again.
    assert len(steps) - len(set(steps)) <= len(RATES)
