"""Joining a real cluster that asks for a token: who is let in, who is told why not, how two sweeps share its slots."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
RATES = [round(0.04 * place, 2) for place in range(1, 13)]
DEADLINE_S = 90.0
JOIN = """
import sys
from qlora_core.errors import SweepError
from qlora_core.sweep.ray_connection import ray_connection
{before}
try:
    with ray_connection(sys.argv[1], None):
        print("joined")
except SweepError as error:
    print(f"refused: {{error}}")
"""


def join(loopback: Any, *, before: str = "", **environment: str) -> str:
    """What a process of its own is told that asks to join."""
    done = subprocess.run(
        [sys.executable, "-c", JOIN.format(before=before), loopback.address],
        env={**loopback.environment, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.1)


def test_the_right_token_is_let_in_and_another_is_refused_by_name(loopback: Any) -> None:
    assert join(loopback) == "joined"
    told = join(loopback, RAY_AUTH_TOKEN="f" * 64)
    assert told.startswith(f"refused: the Ray cluster at '{loopback.address}' refuses the token"), told
    assert "f" * 64 not in told
    assert loopback.environment["RAY_AUTH_TOKEN"] not in told


def test_another_version_of_ray_is_refused_with_both_versions(loopback: Any) -> None:
    """Ray itself compares what the cluster has on record with what the process says it is; the latter is doctored."""
    import ray

    told = join(loopback, before="import ray; ray.__version__ = '2.0.1'")
    assert told.startswith(f"refused: the Ray cluster at '{loopback.address}' runs other versions"), told
    assert "2.0.1" in told
    assert ray.__version__ in told


def taken(work_dir: Path) -> int:
    log = work_dir / "trials" / "steps.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def rows_of(driver: "subprocess.Popen[bytes]", work_dir: Path) -> list[dict[str, Any]]:
    assert driver.wait(DEADLINE_S) == 0, (work_dir / "driver.log").read_text()[-3000:]
    rows = json.loads((work_dir / "rows.json").read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_two_sweeps_share_a_cluster_and_neither_starves(loopback: Any, tmp_path: Path) -> None:
    settings = {"workers": 3, "rates": RATES, "max_attempts": 1}
    undisturbed = rows_of(loopback.drive(tmp_path / "alone", 0.0, {**settings, "workers": 1}), tmp_path / "alone")

    first = loopback.drive(tmp_path / "first", 0.5, settings)
    wait_for(lambda: len(list((tmp_path / "first" / "trials").glob("*.pid"))) == 3, "the first with all three slots")
    second = loopback.drive(tmp_path / "second", 0.5, settings)
    wait_for(lambda: taken(tmp_path / "second") >= 4, "a step of the second")
    assert first.poll() is None, "the second began only when the first had ended"
    before = taken(tmp_path / "first"), taken(tmp_path / "second")
    wait_for(lambda: taken(tmp_path / "first") >= before[0] + 3, "a step of the first beside the second")
    assert second.poll() is None
    assert taken(tmp_path / "second") > before[1]
    for name in ("first", "second"):
        (tmp_path / name / "trials" / "hurry").touch()

    # Slots that were given away took nothing from any trial: not a step, and not one of its lives.
    assert rows_of(first, tmp_path / "first") == undisturbed
    assert rows_of(second, tmp_path / "second") == undisturbed
    left = {name: "leaves its slot" in (tmp_path / name / "driver.log").read_text() for name in ("first", "second")}
    assert left == {"first": True, "second": False}
    for name in ("first", "second"):
        steps = (tmp_path / name / "trials" / "steps.log").read_text().splitlines()
        assert len(steps) == len(set(steps))
