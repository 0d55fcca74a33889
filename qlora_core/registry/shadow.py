"""A candidate's shadow period: begun when the gate says PROMOTE, ended by time or by a broken rule.

The state is a tag of the version. Passing it promotes as any promotion does, against the champion of the moment, or
asks a person where one is to be asked; failing it is recorded in the promotion log. Callers hold the registry's lease.
Knows nothing of answers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from qlora_core.config.gate import GateConfig
from qlora_core.digest import canonical_json
from qlora_core.registry.aliases import CANDIDATE, alias_version, set_alias
from qlora_core.registry.approval import ask
from qlora_core.registry.candidate import champion_stays, clear_candidate, log_decline
from qlora_core.registry.connection import sqlite_file
from qlora_core.registry.evidence import read_evidence
from qlora_core.registry.promotion import SHADOW_TAG, existing_registry, promote, waits_for_approval
from qlora_core.registry.versions import RegisteredVersion, get_version, set_version_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

BY = "shadow period"
State = Literal["running", "passed", "demoted"]


@dataclass(frozen=True)
class Shadow:
    """Where a version's shadow period stands. Times are UTC, ISO 8601."""

    state: State
    since: str
    until: str
    reason: str | None = None

    @property
    def over(self) -> bool:
        """Whether its time has passed."""
        return datetime.now(UTC) >= datetime.fromisoformat(self.until)


def begin(client: "MlflowClient", version: RegisteredVersion, period_s: float) -> Shadow:
    """Make the version `candidate` for its period; one that began before goes on as it was."""
    found = read_shadow(version)
    if found is None:
        now = datetime.now(UTC)
        found = Shadow("running", _text(now), _text(now + timedelta(seconds=period_s)))
        _write(client, version, found)
    if found.state == "running":
        set_alias(client, version.name, CANDIDATE, version.version)
    return found


def read_shadow(version: RegisteredVersion) -> Shadow | None:
    """Where its period stands; None for a version that has none."""
    text = version.tags.get(SHADOW_TAG)
    return None if text is None else Shadow(**json.loads(text))


def running_shadow(tracking_uri: str, model_name: str) -> tuple[RegisteredVersion, Shadow] | None:
    """The candidate in its shadow period; None where there is none. A missing SQLite file is not created."""
    database = sqlite_file(tracking_uri)
    if database is not None and not database.is_file():
        return None
    client = existing_registry(tracking_uri)
    number = alias_version(client, model_name, CANDIDATE)
    version = None if number is None else get_version(client, model_name, number)
    shadow = None if version is None else read_shadow(version)
    return None if version is None or shadow is None or shadow.state != "running" else (version, shadow)


def end(tracking_uri: str, model_name: str, number: str, *, broken: Sequence[str]) -> dict[str, Any]:
    """End a version's running period: demoted for the rules in `broken`, else promoted; as `promote` returns it.

    Under `approve: manual` a passed one then waits for a person, HOLD. A promotion that is held (the champion changed)
    demotes too: the comparison is out of date. Given again it changes nothing more.
    """
    client = existing_registry(tracking_uri)
    version = get_version(client, model_name, number)
    shadow = read_shadow(version)
    if shadow is None or shadow.state == "demoted":
        why = "it is in no shadow period" if shadow is None else shadow.reason or ""
        return champion_stays(client, version, "REJECT", [f"Version {number}: {why}."])
    policy = GateConfig.model_validate(read_evidence(client, version)["policy"])
    if not broken and policy.approve == "manual":
        _write(client, version, replace(shadow, state="passed"))
        ask(client, version, policy.approve_timeout_s)
        return champion_stays(client, version, "HOLD", [waits_for_approval(number)])
    if not broken:
        passed = f"Passed its shadow period from {shadow.since} to {shadow.until}."
        outcome = promote(tracking_uri, model_name, number, by=BY, approval=passed)
        if outcome["verdict"] == "PROMOTE":
            _write(client, version, replace(shadow, state="passed"))
            clear_candidate(client, version)
            return outcome
        broken = outcome["reasons"][-1:]
    reason = "Shadow period: " + "; ".join(broken)
    log_decline(client, version, reason, BY)
    _write(client, version, replace(shadow, state="demoted", reason=reason))
    clear_candidate(client, version)
    return champion_stays(client, version, "REJECT", [reason])


def _write(client: "MlflowClient", version: RegisteredVersion, shadow: Shadow) -> None:
    set_version_tag(client, version, SHADOW_TAG, canonical_json(asdict(shadow)).decode())


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
