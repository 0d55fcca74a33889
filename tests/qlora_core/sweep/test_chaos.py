"""A sweep on a real cluster of several nodes whose workers, nodes, driver or head are killed: the result is the same.

The cluster, its nodes and the driver are processes of their own. The toy trials take their time until the last blow has
fallen and hurry from then on, so that every blow hits a sweep at work.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

RATES = [round(0.04 * place, 2) for place in range(1, 17)]
BLOWS = 10
EVERY_S = 5.0
NODE_BLOWS = (3, 7)
DRIVER_BLOW = 5
DEADLINE_S = 90.0
# Ray waits a minute for a head that is gone. What is tested is what comes after that, not the wait.
IMPATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
_LEFT_OUT = ("seconds", "deaths", "preemptions")
"""What may differ between equal sweeps."""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.1)


def processes(condition: Callable[[list[str]], bool]) -> list[int]:
    """Living processes by the fields of their `stat` after the name: state, parent, group, session and so on."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z" and condition(fields):
                found.append(int(entry.name))
    return found


def workers(work_dir: Path, cluster_session: int) -> list[int]:
    """Living workers of the sweep that have loaded: ids are reused, so only those in the cluster's session count."""
    known = {int(file.stem) for file in (work_dir / "trials").glob("*.pid")}
    return sorted(known & set(processes(lambda fields: int(fields[3]) == cluster_session)))


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in _LEFT_OUT} for row in rows]


class Chaos:
    """One disturbed sweep."""

    def __init__(self, loopback: Any, work_dir: Path) -> None:
        self.loopback, self.work_dir = loopback, work_dir
        self.settings = {"workers": 3, "rates": RATES, "max_attempts": BLOWS}
        self.killed: list[int] = []
        self.random = random.Random(7)
        self.driver = self._drive()

    def strike(self) -> None:
        """All blows, a worker every five seconds and the others between."""
        for blow in range(BLOWS):
            due = time.monotonic() + EVERY_S
            wait_for(lambda: bool(self._workers()) or self.driver.poll() is not None, "a worker")
            assert self.driver.poll() is None, (self.work_dir / "driver.log").read_text()[-3000:]
            victim = self.random.choice(self._workers())
            os.kill(victim, signal.SIGKILL)
            self.killed.append(victim)
            if blow in NODE_BLOWS:
                wait_for(lambda: bool(self._workers()), "a worker whose node is to go")
                self.loopback.tell(f"kill {self._workers()[0]}")
                self.loopback.tell("add")
            if blow == DRIVER_BLOW:
                self.driver.kill()
                self.driver.wait()
                self.driver = self._drive()
            time.sleep(max(0.0, due - time.monotonic()))
        (self.work_dir / "trials" / "hurry").touch()

    def rows(self) -> list[dict[str, Any]]:
        assert self.driver.wait(DEADLINE_S) == 0, (self.work_dir / "driver.log").read_text()[-3000:]
        return json.loads((self.work_dir / "rows.json").read_text())

    def _drive(self) -> subprocess.Popen[bytes]:
        return self.loopback.drive(self.work_dir, 0.8, self.settings)

    def _workers(self) -> list[int]:
        return [pid for pid in workers(self.work_dir, self.loopback.process.pid) if pid not in self.killed]


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_killed_workers_nodes_and_driver_change_no_result(loopback: Any, tmp_path: Path) -> None:
    lone = loopback.drive(tmp_path / "undisturbed", 0.0, {"workers": 1, "rates": RATES, "max_attempts": BLOWS})
    assert lone.wait(DEADLINE_S) == 0, (tmp_path / "undisturbed" / "driver.log").read_text()[-3000:]
    undisturbed = shown(json.loads((tmp_path / "undisturbed" / "rows.json").read_text()))

    chaos = Chaos(loopback, tmp_path / "disturbed")
    chaos.strike()
    rows = chaos.rows()

    assert len(chaos.killed) == BLOWS
    assert shown(rows) == undisturbed
    assert len({row["id"] for row in rows}) == len(rows) == len(RATES)
    assert sum(row["deaths"] for row in rows) + sum(row["preemptions"] for row in rows) >= BLOWS // 2
    assert sum(row["preemptions"] for row in rows) >= 1, "no node was lost with work on it"
    steps = defaultdict(list)
    for line in (tmp_path / "disturbed" / "trials" / "steps.log").read_text().splitlines():
        trial, step = line.split()
        steps[trial].append(int(step))
    # A blow between a step and its checkpoint has that step taken again, and nothing else ever is.
    for trial, taken in steps.items():
        assert all(after - before in (0, 1) for before, after in pairwise(taken)), (trial, taken)
    repeated = sum(len(taken) - len(set(taken)) for taken in steps.values())
    assert repeated <= BLOWS + len(NODE_BLOWS) * 3 + 3

    session = loopback.process.pid
    wait_for(lambda: not workers(chaos.work_dir, session), "the end of the last worker")
    wait_for(lambda: not processes(lambda fields: int(fields[3]) == chaos.driver.pid), "the end of the driver's own")


def steps_of(work_dir: Path) -> list[str]:
    log = work_dir / "trials" / "steps.log"
    return log.read_text().splitlines() if log.exists() else []


def finished(loopback: Any, work_dir: Path) -> list[dict[str, Any]]:
    driver = loopback.drive(work_dir, 0.0, {"workers": 2, "rates": RATES[:4]})
    assert driver.wait(DEADLINE_S) == 0, (work_dir / "driver.log").read_text()[-3000:]
    return shown(json.loads((work_dir / "rows.json").read_text()))


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_a_killed_head_ends_the_driver_and_the_same_command_goes_on(
    make_loopback: Callable[..., Any], loopback: Any, tmp_path: Path
) -> None:
    first, work_dir = make_loopback(2, IMPATIENT), tmp_path / "disturbed"
    driver = first.drive(work_dir, 0.5, {"workers": 2, "rates": RATES[:4]})
    wait_for(lambda: len(steps_of(work_dir)) > 6, "a few steps")
    (head,) = [one for one in psutil.Process(first.process.pid).children(True) if "gcs_server" in one.name()]
    head.kill()
    wait_for(lambda: driver.poll() is not None, "the end of the driver")
    assert driver.returncode != 0
    assert not (work_dir / "rows.json").exists()
    first.end()
    before = steps_of(work_dir)

    assert finished(loopback, work_dir) == finished(loopback, tmp_path / "undisturbed")
    steps = steps_of(work_dir)
    assert 6 < len(before) < len(steps)
    # A blow between a step and its checkpoint has that one taken again.
    assert len(steps) - len(set(steps)) <= 4


@pytest.mark.integration
@pytest.mark.timeout(200)
def test_a_cluster_that_has_ended_leaves_no_process(loopback: Any) -> None:
    """Control of the test before: the processes it looks for are there while the cluster lives."""
    session = loopback.process.pid
    assert len(processes(lambda fields: int(fields[3]) == session)) > 4
    loopback.end()
    wait_for(lambda: not processes(lambda fields: int(fields[3]) == session), "the end of the cluster")
