"""Fifty promoters at once, and one that is killed at every moment of a promotion, on a real SQLite registry."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from qlora_core.config.gate import GateConfig
from qlora_core.registry.aliases import alias_version
from qlora_core.registry.connection import registry_lock
from qlora_core.registry.evidence import evidence_for, write_evidence
from qlora_core.registry.gate.decide import decide
from qlora_core.registry.history import read_moves
from qlora_core.registry.load_check import LOAD_CHECK_TAG, PASSED
from qlora_core.registry.promotion import promote, read_history, rollback
from qlora_core.registry.versions import (
    LINEAGE_TAGS,
    RegisteredVersion,
    get_version,
    register_adapter,
    set_version_tag,
    verify_version,
)

PROMOTER = Path(__file__).with_name("promoter.py")
PROMOTERS = 50

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]


@pytest.fixture
def fifty(
    client: MlflowClient,
    tracking_uri: str,
    experiment_id: str,
    model_name: str,
    better: dict[str, Any],
    write_adapter: Callable[[int], Path],
) -> list[str]:
    """Versions that each beat the base, by evidence from before there was a champion."""
    run_id = client.create_run(experiment_id).info.run_id
    lineage: dict[str, str] = dict.fromkeys(map(str, LINEAGE_TAGS), "0" * 64)
    decision = decide(better, None, GateConfig())
    said = {"verdict": decision.verdict, "reasons": decision.reasons}
    for seed in range(PROMOTERS):
        with registry_lock(tracking_uri):
            version = register_adapter(
                client, model_name, write_adapter(seed), run_id=run_id, run_key=f"{model_name}{seed}", lineage=lineage
            )
        evidence = evidence_for(version, evaluation=better, champion=None, policy=GateConfig(), decision=said)
        write_evidence(client, version, evidence)
        set_version_tag(client, version, LOAD_CHECK_TAG, PASSED)
    return [str(number) for number in range(1, PROMOTERS + 1)]


def test_of_fifty_racing_promoters_one_wins_and_the_others_are_told_why(
    client: MlflowClient, tracking_uri: str, model_name: str, fifty: list[str], tmp_path: Path
) -> None:
    start = tmp_path / "start"
    half = PROMOTERS // 2
    commands = [
        [sys.executable, str(PROMOTER), "race", tracking_uri, model_name, str(start), *part]
        for part in (fifty[:half], fifty[half:])
    ]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [process.stdout.readline() for process in running if process.stdout] == ["ready\n"] * 2
    start.touch()
    answers = [json.loads(line) for process in running for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in running] == [0, 0]

    assert [answer["version"] for answer in answers] == fifty
    winners = [answer["version"] for answer in answers if answer["verdict"] == "PROMOTE"]
    assert len(winners) == 1
    told = [answer for answer in answers if answer["verdict"] == "HOLD"]
    assert len(told) == PROMOTERS - 1
    for answer in told:
        assert f"version {winners[0]} is champion now; evaluate again against it" in answer["reasons"][-1]
        assert answer["champion"] == winners[0]
    assert alias_version(client, model_name, "champion") == winners[0]
    moves = read_moves(client, model_name)
    assert [(move.version, move.previous, move.state) for move in moves] == [(winners[0], None, "done")]


@pytest.fixture
def doomed(tracking_uri: str, model_name: str) -> Iterator[Callable[[str, int], str]]:
    """Runs a promoter that is killed at a moment; gives its fate."""
    command = [sys.executable, str(PROMOTER), "die", tracking_uri, model_name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def run(version: str, point: int) -> str:
            stdin.write(f"{version} {point}\n")
            stdin.flush()
            return stdout.readline().strip()

        yield run
        stdin.close()


def test_a_promoter_killed_at_any_moment_leaves_the_old_champion_or_the_new_and_a_log_that_is_completed(
    client: MlflowClient,
    tracking_uri: str,
    model_name: str,
    register: Callable[..., RegisteredVersion],
    better: dict[str, Any],
    doomed: Callable[[str, int], str],
) -> None:
    heldout = {"gain": 0.2, "gain_low": 0.1, "gain_high": 0.3, "rows": 100}
    register(1, better)
    promote(tracking_uri, model_name, version="1")
    register(2, better, {"version": "1", "heldout": heldout, "exact_match": None})

    seen, point = set(), 0
    while (fate := doomed("2", point)) == "killed":
        champion = alias_version(client, model_name, "champion")
        assert champion in ("1", "2")
        verify_version(client, get_version(client, model_name, champion))  # it is there, and its bytes are
        left = read_history(tracking_uri, model_name)  # the log reads, whatever was being written
        seen.add((champion, left["moves"][-1]["state"]))

        answer = promote(tracking_uri, model_name, version="2")
        assert (answer["verdict"], answer["champion"]) == ("PROMOTE", "2")
        moves = read_moves(client, model_name)
        assert all(move.state in ("done", "abandoned") for move in moves)
        assert (moves[-1].version, moves[-1].state) == ("2", "done")
        assert alias_version(client, model_name, "previous_champion") == "1"
        rollback(tracking_uri, model_name, "1", f"after moment {point}")
        point += 1
    assert fate == "exit 0"
    assert point == 12  # two entries with their heads, two aliases: before and after each
    # Before anything, after the entry, after the alias, after its being recorded
    assert seen == {("1", "done"), ("1", "started"), ("2", "started"), ("2", "done")}
