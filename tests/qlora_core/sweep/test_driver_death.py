"""The driver process of a sweep is interrupted, then killed; the same command goes on, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qlora_core.errors import SweepError
from qlora_core.sweep.lock import exclusive_lock

TOY = Path(__file__).with_name("toy_sweep.py")
DEADLINE_S = 120.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.1)


def steps_taken(work_dir: Path) -> list[str]:
    log = work_dir / "trials" / "steps.log"
    return log.read_text().split("\n")[:-1] if log.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def in_group(group: int) -> list[int]:
    """Living processes of a process group or session: the driver's own, and all of Ray's."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except FileNotFoundError:
                continue
            if group in (int(fields[2]), int(fields[3])):
                found.append(int(entry.name))
    return found


def run_until_steps(work_dir: Path, more: int, *, group_signal: int | None = None) -> subprocess.Popen[bytes]:
    """Start the toy sweep as a program and let it take `more` steps, then send its whole foreground group a signal."""
    before = len(steps_taken(work_dir))
    with (work_dir / "driver.log").open("ab") as log:
        driver = subprocess.Popen(
            [sys.executable, str(TOY), str(work_dir), "0.3"], start_new_session=True, stdout=log, stderr=log
        )
    wait_for(lambda: len(steps_taken(work_dir)) >= before + more or driver.poll() is not None, f"{more} more steps")
    assert driver.poll() is None, (work_dir / "driver.log").read_text()
    if group_signal is not None:
        os.killpg(driver.pid, group_signal)
    return driver


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_sweep_survives_ctrl_c_and_a_killed_driver(toy: ModuleType, tmp_path: Path) -> None:
    reference = toy.toy_sweep(tmp_path / "reference", workers=1)
    work_dir = tmp_path / "interrupted"
    work_dir.mkdir()

    interrupted = run_until_steps(work_dir, 3, group_signal=signal.SIGINT)
    assert interrupted.wait(DEADLINE_S) != 0
    assert "KeyboardInterrupt" in (work_dir / "driver.log").read_text()
    wait_for(lambda: not in_group(interrupted.pid), "the end of every process after Ctrl-C")

    killed = run_until_steps(work_dir, 3)
    killed.kill()
    killed.wait()
    wait_for(lambda: not in_group(killed.pid), "the end of every process after the driver was killed")

    def rows(records: list) -> list[dict]:
        return [{name: value for name, value in record.row().items() if name != "seconds"} for record in records]

    assert rows(toy.toy_sweep(work_dir)) == rows(reference)
    taken = steps_taken(work_dir)
    assert len(taken) == len(set(taken)), "a step was taken twice"


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    lock = tmp_path / "driver.lock"
    with (
        exclusive_lock(lock, purpose="first", wait_s=0),
        pytest.raises(SweepError, match=f"second: process {os.getpid()} holds"),
        exclusive_lock(lock, purpose="second", wait_s=0.3),
    ):
        pass
    with exclusive_lock(lock, purpose="third", wait_s=0):
        pass
