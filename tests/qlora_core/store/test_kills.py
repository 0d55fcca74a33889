"""`kill -9` at every step to the disk, in the middle of writes, and at random: the old state or the new, never less."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MEMORY = Path("/dev/shm")
PROGRAMS = Path(__file__).parent / "programs"
ROUNDS = 200


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory where there is such a thing.

    A kill is no power cut: what was written is there, on whatever disk, and these are thousands of synced writes.
    """
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir=MEMORY))
    yield folder
    shutil.rmtree(folder)


def report_of(program: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, PROGRAMS / program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kill_before_every_step_leaves_the_old_state_or_the_new(folder: Path) -> None:
    report = report_of("kill_everywhere.py", folder)
    assert [(name, fault) for name, series in report.items() for fault in series["faults"]] == []
    # Negative control: the kills came at every stage of a publication, and in the middle of every kind of file.
    assert {"none", "held", "publishing", "committed", "free"} <= set(report["Build"]["states"])
    assert {"none", "held", "committed", "free"} <= set(report["Torn"]["states"])
    assert {"old", "new"} == set(report["Swap"]["states"])
    for name, least in {"Build": 60, "Mend": 70, "Read": 10, "Swap": 15, "Torn": 8}.items():
        assert report[name]["boundaries"] >= least
    # A dead process is seen to be dead at once: nobody waits for its lease to expire.
    assert max(series["slowest_s"] for series in report.values()) < 10


def test_kills_at_random_moments_lose_nothing_that_was_published(folder: Path) -> None:
    report = report_of("kill_randomly.py", folder, ROUNDS, 20240607)
    store, control = report["store"], report["control"]["states"]
    assert store["faults"] == []
    killed_midway = sum(store["states"].get(state, 0) for state in ("none", "held", "publishing", "committed"))
    assert killed_midway >= ROUNDS // 10
    # Negative control: the same kills find a writer that works in place halfway.
    assert control.get("partial", 0) + control.get("corrupt", 0) >= ROUNDS // 10
