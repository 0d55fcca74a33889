"""Promotion and rollback by hand: decide again from the recorded evidence, verify the bytes, move the alias.

Measures nothing: a version without evidence of its own cannot be promoted here except by force, with a reason on
record.
"""

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qlora_core.config.gate import GateConfig
from qlora_core.errors import RegistryError
from qlora_core.registry.aliases import CHALLENGER, CHAMPION, alias_version, former_champions, move_champion
from qlora_core.registry.connection import connect, sqlite_file, without_credentials
from qlora_core.registry.evidence import champion_changed, compared_champion, decide_again, read_evidence
from qlora_core.registry.gate import Decision
from qlora_core.registry.history import read_moves
from qlora_core.registry.load_check import LOAD_CHECK_TAG, PASSED
from qlora_core.registry.versions import RegisteredVersion, get_version, verify_version

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MAX_REASON_CHARACTERS = 1000

_log = logging.getLogger(__name__)


def promote(
    tracking_uri: str,
    model_name: str,
    version: str | None = None,
    policy: GateConfig | None = None,
    *,
    force_reason: str | None = None,
) -> dict[str, Any]:
    """Decide again on a version's recorded evidence, and make it champion if the verdict is PROMOTE.

    `version` None means the challenger; `policy` None means the one recorded with the evidence. `force_reason` moves
    the alias whatever the verdict, recorded with that reason; it never excuses files that differ from those registered
    or that were not proven to load. A champion that changed since the evidence was made turns PROMOTE into HOLD. Keys:
    verdict (the gate's, forced or not), reasons, champion (after), previous (before), version, forced. Raises
    RegistryError.
    """
    if force_reason is not None:
        _check_reason(force_reason)
    client = _existing(tracking_uri)
    wanted = _wanted(client, model_name, version)
    previous = alias_version(client, model_name, CHAMPION)
    evidence = read_evidence(client, wanted)
    decision = decide_again(evidence, policy)
    expected = compared_champion(evidence["champion"])
    if decision.verdict == "PROMOTE" and previous not in (expected, wanted.version):
        decision = Decision("HOLD", (*decision.reasons, champion_changed(expected, previous)))
    champion, forced = previous, decision.verdict != "PROMOTE" and force_reason is not None
    if decision.verdict == "PROMOTE" or forced:
        _verify(client, wanted)
        reason = f"Forced: {force_reason}" if forced else " ".join(decision.reasons)
        outcome = move_champion(client, model_name, wanted.version, expected=previous, action="promote", reason=reason)
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
    _check_reason(reason)
    client = _existing(tracking_uri)
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
    """The champion's version (None: there is none) and every move of the alias, oldest first. Raises RegistryError."""
    client = _existing(tracking_uri)
    moves = [asdict(move) for move in read_moves(client, model_name)]
    return {"champion": alias_version(client, model_name, CHAMPION), "moves": moves}


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


def _existing(tracking_uri: str) -> "MlflowClient":
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


def _check_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > _MAX_REASON_CHARACTERS:
        raise RegistryError(
            f"the reason has {len(reason.strip())} characters; say why in 1 to {_MAX_REASON_CHARACTERS}, for the record"
        )
