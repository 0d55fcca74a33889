"""`kill -9` at every step to the disk, in the middle of writes, and at random: the old state or the new, never less."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
ROUNDS = 200


def report_of(program: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, PROGRAMS / program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kill_before_every_step_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    report = report_of("kill_everywhere.py", tmp_path)
    assert [(name, fault) for name, series in report.items() for fault in series["faults"]] == []
    # Negative control: the kills came at every stage of a publication, and in the middle of every kind of file.
    assert {"none", "held", "publishing", "committed", "free"} <= set(report["Build"]["states"])
    assert {"none", "held", "committed", "free"} <= set(report["Torn"]["states"])
    assert {"old", "new"} == set(report["Swap"]["states"])
    for name, least in {"Build": 60, "Mend": 70, "Read": 10, "Swap": 15, "Torn": 8}.items():
        assert report[name]["boundaries"] >= least
    # A dead process is seen to be dead at once: nobody waits for its lease to expire.
    assert max(series["slowest_s"] for series in report.values()) < 10


def test_kills_at_random_moments_lose_nothing_that_was_published(tmp_path: Path) -> None:
    report = report_of("kill_randomly.py", tmp_path, ROUNDS, 20240607)
    store, control = report["store"], report["control"]["states"]
    assert store["faults"] == []
    killed_midway = sum(store["states"].get(state, 0) for state in ("none", "held", "publishing", "committed"))
    assert killed_midway >= ROUNDS // 5
    # Negative control: the same kills find a writer that works in place halfway.
    assert control.get("partial", 0) + control.get("corrupt", 0) >= ROUNDS // 5
