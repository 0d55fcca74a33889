"""Promotion and rollback by hand: decide again from the recorded evidence, verify the bytes, move the alias.

Measures nothing: a version without evidence of its own cannot be promoted here except by force, with a reason on
record.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qlora_core.config.gate import GateConfig
from qlora_core.errors import RegistryError
from qlora_core.registry.aliases import CHALLENGER, CHAMPION, alias_version, former_champions, move_champion
from qlora_core.registry.connection import connect, sqlite_file, without_credentials
from qlora_core.registry.evidence import (
    EVIDENCE_TAG,
    champion_changed,
    compared_champion,
    decide_again,
    read_evidence,
)
from qlora_core.registry.gate.decide import Decision
from qlora_core.registry.history import read_log
from qlora_core.registry.load_check import LOAD_CHECK_TAG, PASSED
from qlora_core.registry.versions import RegisteredVersion, get_version, verify_version

if TYPE_CHECKING:
    from mlflow import MlflowClient

SHADOW_TAG = "shadow"
_MAX_REASON_CHARACTERS = 1000

_log = logging.getLogger(__name__)


def promote(
    tracking_uri: str,
    model_name: str,
    version: str | None = None,
    policy: GateConfig | None = None,
    *,
    force_reason: str | None = None,
    by: str | None = None,
    approval: str | None = None,
) -> dict[str, Any]:
    """Decide again on a version's recorded evidence, and make it champion if the verdict is PROMOTE.

    `version` None means the challenger; `policy` None means the one recorded with the evidence. `force_reason` moves
    the alias whatever the verdict, recorded with that reason; it never excuses files that differ from those registered
    or that were not proven to load. PROMOTE becomes HOLD where the champion changed since the evidence was made and,
    under `approve: manual`, unless `by` and `approval` say who approves and why (see `approval.answer`). Keys: verdict
    (the gate's, forced or not), reasons, champion (after), previous (before), version, forced. Raises RegistryError.
    """
    if force_reason is not None:
        check_reason(force_reason)
    client = existing_registry(tracking_uri)
    wanted = _wanted(client, model_name, version)
    previous = alias_version(client, model_name, CHAMPION)
    evidence = read_evidence(client, wanted)
    decision = decide_again(evidence, policy)
    if decision.verdict == "PROMOTE" and (hindrance := _hindrance(evidence, policy, wanted, previous, by)):
        decision = Decision("HOLD", (*decision.reasons, hindrance))
    champion, forced = previous, decision.verdict != "PROMOTE" and force_reason is not None
    if decision.verdict == "PROMOTE" or forced:
        _verify(client, wanted)
        reason = f"Forced: {force_reason}" if forced else approval or " ".join(decision.reasons)
        outcome = move_champion(
            client,
            model_name,
            wanted.version,
            expected=previous,
            action="promote",
            reason=reason,
            by=by,
            evidence=wanted.tag(EVIDENCE_TAG),
        )
        champion = outcome.champion
        if not outcome.moved:
            forced = False
            decision = Decision("HOLD", (*decision.reasons, champion_changed(previous, champion)))
    return _answer(decision, champion=champion, previous=previous, version=wanted.version, forced=forced)


def rollback(tracking_uri: str, model_name: str, to: str | None, reason: str) -> dict[str, Any]:
    """Give the champion alias back to an earlier one: the one before (`to` None) or version `to`; `reason` is kept.

    The earlier champion's files are verified first. Keys: champion, previous (what was champion), reason. Raises
    RegistryError when there is no earlier champion, when `to` never was champion, or when another process moved the
    alias.
    """
    check_reason(reason)
    client = existing_registry(tracking_uri)
    line = former_champions(client, model_name)
    if not line:
        raise RegistryError(f"{model_name!r} has no champion, so there is nothing to roll back; see `qlora promote`")
    *earlier, current = line
    target = _target(model_name, earlier, current, to)
    _verify(client, get_version(client, model_name, target))
    outcome = move_champion(client, model_name, target, expected=current, action="rollback", reason=reason)
    if not outcome.moved:
        raise RegistryError(
            f"champion of {model_name!r} is version {outcome.champion} by now, not {current}: another process moved "
            "it; look again before rolling back"
        )
    return {"champion": target, "previous": current, "reason": reason}


def read_history(tracking_uri: str, model_name: str) -> dict[str, Any]:
    """The champion's version (None: there is none), every move of the alias, oldest first, and the log's `head`.

    Raises RegistryError where the log is not as it was written.
    """
    client = existing_registry(tracking_uri)
    log = read_log(client, model_name)
    moves = [asdict(move) for move in log.moves]
    return {"champion": alias_version(client, model_name, CHAMPION), "moves": moves, "head": log.head}


def _hindrance(
    evidence: Mapping[str, Any],
    policy: GateConfig | None,
    wanted: RegisteredVersion,
    champion: str | None,
    by: str | None,
) -> str | None:
    """Why a version that its evidence would promote is held all the same; None where nothing stands in the way."""
    expected = compared_champion(evidence["champion"])
    if champion == wanted.version:
        return None
    if champion != expected:
        return champion_changed(expected, champion)
    if by is not None:
        return None
    shadow = json.loads(wanted.tags.get(SHADOW_TAG, "{}"))
    if shadow.get("state") in ("running", "demoted"):
        return in_shadow(wanted.version, shadow["until"]) if shadow["state"] == "running" else shadow["reason"]
    approve = policy.approve if policy is not None else evidence["policy"].get("approve")
    return waits_for_approval(wanted.version) if approve == "manual" else None


def _answer(decision: Decision, **rest: Any) -> dict[str, Any]:
    return {"verdict": decision.verdict, "reasons": list(decision.reasons), **rest}


def _target(model_name: str, earlier: list[str], current: str, to: str | None) -> str:
    if to is None and not earlier:
        raise RegistryError(f"version {current} is the first champion of {model_name!r}: there is none to go back to")
    if to is None:
        return earlier[-1]
    if to not in earlier:
        known = ", ".join(earlier) or "none"
        raise RegistryError(
            f"version {to} of {model_name!r} is no earlier champion (these are: {known}); "
            "a version that never was champion is promoted, not rolled back to"
        )
    return to


def existing_registry(tracking_uri: str) -> "MlflowClient":
    """A client of a registry that is there already. Raises RegistryError for a SQLite file that is not."""
    database = sqlite_file(tracking_uri)
    if database is not None and not database.is_file():
        raise RegistryError(
            f"no registry at {without_credentials(tracking_uri)}; register an adapter with `qlora run` first"
        )
    return connect(tracking_uri)


def _wanted(client: "MlflowClient", model_name: str, version: str | None) -> RegisteredVersion:
    number = version if version is not None else alias_version(client, model_name, CHALLENGER)
    if number is None:
        raise RegistryError(
            f"{model_name!r} has no {CHALLENGER}; register an adapter with `qlora run`, or name a version"
        )
    return get_version(client, model_name, number)


def _verify(client: "MlflowClient", version: RegisteredVersion) -> None:
    if version.tag(LOAD_CHECK_TAG) != PASSED:
        raise RegistryError(
            f"version {version.version} of {version.name!r} was never shown to load in a clean process; "
            "register it again"
        )
    verify_version(client, version)


def waits_for_approval(version: str) -> str:
    """Why a version that the gate would promote is held."""
    return (
        f"gate.approve is manual: version {version} waits for a person's decision "
        "(`qlora promote CONFIG --approve --by WHO --reason WHY`, or --decline)."
    )


def in_shadow(version: str, until: str) -> str:
    """Why a version that the gate would promote is held for a while."""
    return f"Version {version} is candidate and answers beside the champion until {until} (gate.shadow)."


def check_reason(reason: str) -> None:
    """Raises RegistryError unless somebody says why, at readable length."""
    if not reason.strip() or len(reason) > _MAX_REASON_CHARACTERS:
        raise RegistryError(
            f"the reason has {len(reason.strip())} characters; say why in 1 to {_MAX_REASON_CHARACTERS}, for the record"
        )
