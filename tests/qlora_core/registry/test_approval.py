"""A person's decision on a waiting version: carried out once, recorded with name and reason, and HOLD without one."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from mlflow import MlflowClient

from qlora_core.config.gate import GateConfig
from qlora_core.errors import RegistryError
from qlora_core.registry import approval
from qlora_core.registry.aliases import CANDIDATE, CHAMPION, alias_version
from qlora_core.registry.approval import answer, approval_of, ask, awaited_by, expire_overdue, note_flow_run
from qlora_core.registry.history import read_log
from qlora_core.registry.promotion import promote
from qlora_core.registry.versions import RegisteredVersion, get_version, set_version_tag

MANUAL = GateConfig(approve="manual")
Register = Callable[..., RegisteredVersion]


@pytest.fixture
def waiting(client: MlflowClient, register: Register, better: dict[str, Any]) -> RegisteredVersion:
    version = register(1, better)
    assert ask(client, version, 3600.0).state == "waiting"
    return version


def overdue(client: MlflowClient, version: RegisteredVersion) -> None:
    entry = json.loads(get_version(client, version.name, version.version).tags[approval.APPROVAL_TAG])
    entry["deadline"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    set_version_tag(client, version, approval.APPROVAL_TAG, json.dumps(entry))


def last_move(client: MlflowClient, model_name: str) -> dict[str, Any]:
    return vars(read_log(client, model_name).moves[-1])


def test_waiting_version_is_candidate_and_no_command_without_a_name_promotes_it(
    client: MlflowClient, tracking_uri: str, waiting: RegisteredVersion
) -> None:
    assert alias_version(client, waiting.name, CANDIDATE) == "1"
    assert alias_version(client, waiting.name, CHAMPION) is None
    outcome = promote(tracking_uri, waiting.name, "1", MANUAL)
    assert (outcome["verdict"], outcome["champion"]) == ("HOLD", None)
    assert "qlora promote CONFIG --approve" in outcome["reasons"][-1]
    # The same evidence, under a policy that asks nobody.
    assert promote(tracking_uri, waiting.name, "1", GateConfig())["verdict"] == "PROMOTE"


def test_approval_moves_the_alias_and_is_logged_with_name_and_reason(
    client: MlflowClient, tracking_uri: str, waiting: RegisteredVersion
) -> None:
    outcome = answer(tracking_uri, waiting.name, "approve", by="ada", why="read 40 answers", policy=MANUAL)
    assert (outcome["verdict"], outcome["champion"], outcome["approval"]) == ("PROMOTE", "1", "approved")
    move = last_move(client, waiting.name)
    assert (move["action"], move["by"], move["reason"], move["state"]) == ("promote", "ada", "read 40 answers", "done")
    assert alias_version(client, waiting.name, CANDIDATE) is None
    again = answer(tracking_uri, waiting.name, "approve", by="ada", why="once more", version="1", policy=MANUAL)
    assert again["verdict"] == "PROMOTE"
    assert len(read_log(client, waiting.name).moves) == 1
    with pytest.raises(RegistryError, match=r"approved by ada .*read 40 answers"):
        answer(tracking_uri, waiting.name, "decline", by="bob", why="no", version="1", policy=MANUAL)


def test_decline_keeps_the_champion_and_is_logged(
    client: MlflowClient, tracking_uri: str, waiting: RegisteredVersion
) -> None:
    outcome = answer(tracking_uri, waiting.name, "decline", by="bob", why="rude in French", policy=MANUAL)
    assert (outcome["verdict"], outcome["champion"], outcome["approval"]) == ("HOLD", None, "declined")
    move = last_move(client, waiting.name)
    assert (move["action"], move["by"], move["reason"], move["state"]) == (
        "decline",
        "bob",
        "rude in French",
        "declined",
    )
    assert alias_version(client, waiting.name, CANDIDATE) is None
    again = answer(tracking_uri, waiting.name, "decline", by="bob", why="as I said", version="1", policy=MANUAL)
    assert (again["verdict"], again["approval"]) == ("HOLD", "declined")
    assert len(read_log(client, waiting.name).moves) == 1
    with pytest.raises(RegistryError, match="declined by bob"):
        answer(tracking_uri, waiting.name, "approve", by="ada", why="I differ", version="1", policy=MANUAL)


def test_no_answer_in_time_is_hold_whoever_looks_first(
    client: MlflowClient, tracking_uri: str, waiting: RegisteredVersion
) -> None:
    assert expire_overdue(tracking_uri, waiting.name) is None
    overdue(client, waiting)
    late = answer(tracking_uri, waiting.name, "approve", by="ada", why="sorry, holidays", policy=MANUAL)
    assert (late["verdict"], late["champion"], late["approval"]) == ("HOLD", None, "expired")
    assert alias_version(client, waiting.name, CANDIDATE) is None
    move = last_move(client, waiting.name)
    assert (move["action"], move["by"], move["state"]) == ("decline", None, "declined")
    assert "No decision by" in move["reason"]
    again = answer(tracking_uri, waiting.name, "approve", by="ada", why="really", version="1", policy=MANUAL)
    assert again["verdict"] == "HOLD"


def test_sweeper_closes_an_overdue_approval_once(
    client: MlflowClient, tracking_uri: str, waiting: RegisteredVersion
) -> None:
    overdue(client, waiting)
    closed = expire_overdue(tracking_uri, waiting.name)
    assert closed is not None and closed[0] == "1" and closed[1].state == "expired"
    assert expire_overdue(tracking_uri, waiting.name) is None


def test_decision_needs_a_name_and_a_reason_and_something_that_waits(
    tracking_uri: str, waiting: RegisteredVersion, register: Register, better: dict[str, Any]
) -> None:
    with pytest.raises(RegistryError, match="say why"):
        answer(tracking_uri, waiting.name, "approve", by="ada", why=" ", policy=MANUAL)
    with pytest.raises(RegistryError, match="who decides"):
        answer(tracking_uri, waiting.name, "approve", by=" ", why="yes", policy=MANUAL)
    other = register(2, better)
    with pytest.raises(RegistryError, match="waits for no decision"):
        answer(tracking_uri, waiting.name, "approve", by="ada", why="yes", version=other.version, policy=MANUAL)


def test_process_that_died_after_the_alias_moved_is_finished_by_the_next(
    client: MlflowClient, tracking_uri: str, waiting: RegisteredVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(approval, "_write", die)
        with pytest.raises(KeyboardInterrupt):
            answer(tracking_uri, waiting.name, "approve", by="ada", why="yes", policy=MANUAL)
    assert alias_version(client, waiting.name, CHAMPION) == "1"
    assert answer(tracking_uri, waiting.name, "approve", by="ada", why="yes", policy=MANUAL)["verdict"] == "PROMOTE"
    assert approval_of(tracking_uri, waiting.name, "1")[1].state == "approved"
    assert len(read_log(client, waiting.name).moves) == 1


def test_champion_that_changed_meanwhile_holds_an_approval_which_goes_on_waiting(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str
) -> None:
    first, second = register(1, better), register(2, better)
    for version in (first, second):
        ask(client, version, 3600.0)
    answer(tracking_uri, model_name, "approve", by="ada", why="first", version="1", policy=MANUAL)
    outcome = answer(tracking_uri, model_name, "approve", by="ada", why="second", version="2", policy=MANUAL)
    assert (outcome["verdict"], outcome["champion"], outcome["approval"]) == ("HOLD", "1", "waiting")
    assert "evaluate again" in outcome["reasons"][-1]


def test_flow_run_that_waits_is_found_again_after_the_decision(tracking_uri: str, waiting: RegisteredVersion) -> None:
    note_flow_run(tracking_uri, waiting.name, "1", "0d9b1f9e-0000-4000-8000-000000000001")
    answer(tracking_uri, waiting.name, "decline", by="bob", why="no", policy=MANUAL)
    assert awaited_by(tracking_uri, waiting.name, "0d9b1f9e-0000-4000-8000-000000000001") == "1"
    assert awaited_by(tracking_uri, waiting.name, "another") is None
    assert approval_of(tracking_uri, waiting.name, "1")[1].flow_run is not None
