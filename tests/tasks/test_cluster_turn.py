"""Sweeps wait for their turn on a cluster with a limit: real processes, a real Prefect server."""

import json
import subprocess
import sys

import pytest

from qlora_core.config.compute import ComputeConfig
from tasks.cluster_turn import limit_name

TURN = """
import json, sys, time
from qlora_core.config.compute import ComputeConfig
from tasks.cluster_turn import cluster_turn
print("ready", flush=True)
sys.stdin.readline()
with cluster_turn(ComputeConfig(**json.loads(sys.argv[1]))):
    begun = time.time()
    time.sleep(6)
    print(json.dumps([begun, time.time()]))
"""


def test_the_limit_is_named_by_the_cluster() -> None:
    here = ComputeConfig()
    there = ComputeConfig(ray_address="ray://head:10001")
    assert limit_name(there) == "qlora sweeps head:10001"
    assert limit_name(here) == limit_name(ComputeConfig(workers=3)) != limit_name(there)


def overlap(env: dict[str, str], settings: dict[str, object]) -> float:
    """Seconds in which both of two processes have their turn; negative: between the turns."""
    command = [sys.executable, "-c", TURN, json.dumps(settings)]
    both = [
        subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in both:  # started together only once both have imported all they need, however busy the machine is
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    turns = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both]
    return min(end for _, end in turns) - max(begun for begun, _ in turns)


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_one_sweep_at_a_time_where_the_cluster_allows_one(prefect_server: dict[str, str]) -> None:
    at: dict[str, object] = {"ray_address": "192.0.2.7:6379"}
    assert overlap(prefect_server, {**at, "sweeps_at_once": 1}) <= 0
    # Control: with room for both, or without a limit, they go together.
    assert overlap(prefect_server, {**at, "sweeps_at_once": 2}) > 0
    assert overlap(prefect_server, at) > 0
