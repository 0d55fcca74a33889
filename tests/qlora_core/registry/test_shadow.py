"""A shadow period on a real registry: nobody promotes past it, and it ends in a promotion, a demotion or a question."""

from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient

from qlora_core.config.gate import GateConfig
from qlora_core.registry.aliases import CANDIDATE, CHAMPION, alias_version
from qlora_core.registry.approval import answer
from qlora_core.registry.evidence import evidence_for, write_evidence
from qlora_core.registry.history import read_log
from qlora_core.registry.promotion import promote
from qlora_core.registry.shadow import begin, end, read_shadow, running_shadow
from qlora_core.registry.versions import RegisteredVersion, get_version

Register = Callable[..., RegisteredVersion]


@pytest.fixture
def candidate(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str
) -> RegisteredVersion:
    """Version 2, better than champion 1, at the beginning of its period."""
    register(1, better)
    assert promote(tracking_uri, model_name, "1")["verdict"] == "PROMOTE"
    rival = {"version": "1", "heldout": {"gain": 0.2, "gain_low": 0.1, "gain_high": 0.3, "rows": 100}}
    version = register(2, better, {**rival, "exact_match": None})
    assert begin(client, version, 3600.0).state == "running"
    return version


def test_nobody_promotes_past_a_running_period(
    client: MlflowClient, tracking_uri: str, candidate: RegisteredVersion
) -> None:
    assert alias_version(client, candidate.name, CANDIDATE) == "2"
    outcome = promote(tracking_uri, candidate.name, "2")
    assert (outcome["verdict"], outcome["champion"]) == ("HOLD", "1")
    assert "answers beside the champion until" in outcome["reasons"][-1]
    found = running_shadow(tracking_uri, candidate.name)
    assert found is not None and found[0].version == "2" and not found[1].over
    again = begin(client, get_version(client, candidate.name, "2"), 9.0)
    assert again == found[1]


def test_broken_rule_demotes_once_and_for_all(
    client: MlflowClient, tracking_uri: str, candidate: RegisteredVersion
) -> None:
    for _ in range(2):
        outcome = end(tracking_uri, candidate.name, "2", broken=["degenerate answers: 40 % against 1 %"])
        assert (outcome["verdict"], outcome["champion"]) == ("REJECT", "1")
    assert alias_version(client, candidate.name, CANDIDATE) is None
    assert running_shadow(tracking_uri, candidate.name) is None
    *_, move = read_log(client, candidate.name).moves
    assert (move.action, move.version, move.by, move.state) == ("decline", "2", "shadow period", "declined")
    assert "40 %" in move.reason
    assert len(read_log(client, candidate.name).moves) == 2
    later = promote(tracking_uri, candidate.name, "2")
    assert later["verdict"] == "HOLD" and "40 %" in later["reasons"][-1]


def test_passed_period_promotes(client: MlflowClient, tracking_uri: str, candidate: RegisteredVersion) -> None:
    outcome = end(tracking_uri, candidate.name, "2", broken=[])
    assert (outcome["verdict"], outcome["champion"]) == ("PROMOTE", "2")
    assert alias_version(client, candidate.name, CANDIDATE) is None
    shadow = read_shadow(get_version(client, candidate.name, "2"))
    assert shadow is not None and shadow.state == "passed"
    assert end(tracking_uri, candidate.name, "2", broken=[])["verdict"] == "PROMOTE"
    assert read_log(client, candidate.name).moves[-1].by == "shadow period"


def test_period_never_answers_for_the_person(
    client: MlflowClient, tracking_uri: str, candidate: RegisteredVersion, better: dict[str, Any]
) -> None:
    manual = GateConfig(approve="manual")
    rival = {"version": "1", "heldout": {"gain": 0.2, "gain_low": 0.1, "gain_high": 0.3, "rows": 100}}
    said = {"verdict": "PROMOTE", "reasons": ["better"]}
    champion = {**rival, "exact_match": None}
    write_evidence(
        client,
        candidate,
        evidence_for(candidate, evaluation=better, champion=champion, policy=manual, decision=said),
    )
    outcome = end(tracking_uri, candidate.name, "2", broken=[])
    assert (outcome["verdict"], outcome["champion"]) == ("HOLD", "1")
    assert alias_version(client, candidate.name, CANDIDATE) == "2"
    approved = answer(tracking_uri, candidate.name, "approve", by="ada", why="fine", policy=manual)
    assert approved["champion"] == alias_version(client, candidate.name, CHAMPION) == "2"


def test_champion_that_changed_meanwhile_sends_the_candidate_back(
    client: MlflowClient, tracking_uri: str, candidate: RegisteredVersion, register: Register, better: dict[str, Any]
) -> None:
    register(3, better)
    assert promote(tracking_uri, candidate.name, "3", force_reason="an emergency")["champion"] == "3"
    outcome = end(tracking_uri, candidate.name, "2", broken=[])
    assert (outcome["verdict"], outcome["champion"]) == ("REJECT", "3")
    assert "evaluate again" in outcome["reasons"][0]
