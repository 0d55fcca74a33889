"""A person's word on a version that the gate would promote: asked for, given, declined, or not given in time.

The state is a tag of the version, so that any machine sees it; who decided and why goes into the promotion log. Until
somebody approves, the version is `candidate` and the champion stays. Callers hold the registry's lease, so that two
people's answers come one after the other. Knows nothing of how people are asked.
"""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from qlora_core.config.gate import GateConfig
from qlora_core.digest import canonical_json
from qlora_core.errors import RegistryError
from qlora_core.registry.aliases import CANDIDATE, alias_version, set_alias
from qlora_core.registry.candidate import champion_stays, clear_candidate, log_decline
from qlora_core.registry.connection import registry_errors, sqlite_file
from qlora_core.registry.promotion import check_reason, existing_registry, promote
from qlora_core.registry.versions import RegisteredVersion, get_version, set_version_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

APPROVAL_TAG = "approval"
WAITING_RUN_TAG = "approval_flow_run"
State = Literal["waiting", "approved", "declined", "expired"]
Choice = Literal["approve", "decline"]


@dataclass(frozen=True)
class Approval:
    """Where a version's approval stands. Times are UTC, ISO 8601; `flow_run` is the suspended run that waits."""

    state: State
    asked_at: str
    deadline: str
    by: str | None = None
    why: str | None = None
    at: str | None = None
    flow_run: str | None = None

    @property
    def overdue(self) -> bool:
        """Whether nobody answered in time."""
        return self.state == "waiting" and datetime.now(UTC) > datetime.fromisoformat(self.deadline)

    @property
    def seconds_left(self) -> float:
        """Time left for an answer, in seconds; 0 where there is none."""
        return max(0.0, (datetime.fromisoformat(self.deadline) - datetime.now(UTC)).total_seconds())


def ask(client: "MlflowClient", version: RegisteredVersion, timeout_s: float) -> Approval:
    """Make the version `candidate` and let it wait; one that waits already, or was decided on, stays as it is."""
    found = read_approval(version)
    if found is None:
        now = datetime.now(UTC)
        found = Approval("waiting", _text(now), _text(now + timedelta(seconds=timeout_s)))
        _write(client, version, found)
    if found.state == "waiting":
        set_alias(client, version.name, CANDIDATE, version.version)
    return found


def read_approval(version: RegisteredVersion) -> Approval | None:
    """Where its approval stands; None for a version that never needed one."""
    text = version.tags.get(APPROVAL_TAG)
    return None if text is None else Approval(**json.loads(text))


def note_flow_run(tracking_uri: str, model_name: str, version: str, flow_run: str) -> Approval:
    """Remember which suspended flow run waits for the answer, so that an answer given elsewhere can wake it."""
    client = existing_registry(tracking_uri)
    found = get_version(client, model_name, version)
    approval = replace(_asked(found), flow_run=flow_run)
    set_version_tag(client, found, WAITING_RUN_TAG, flow_run)
    _write(client, found, approval)
    return approval


def awaited_by(tracking_uri: str, model_name: str, flow_run: str) -> str | None:
    """The version whose approval that flow run waits, or waited, for; None where it asked for none."""
    client = existing_registry(tracking_uri)
    with registry_errors(f"looking for what flow run {flow_run} waits for"):
        found = client.search_model_versions(f"name = '{model_name}' and tags.{WAITING_RUN_TAG} = '{flow_run}'")
    return str(found[0].version) if found else None


def approval_of(tracking_uri: str, model_name: str, version: str | None = None) -> tuple[str, Approval]:
    """The version (None: the candidate) and where its approval stands. RegistryError where none was asked for."""
    client = existing_registry(tracking_uri)
    found = _wanted(client, model_name, version)
    return found.version, _asked(found)


def answer(
    tracking_uri: str,
    model_name: str,
    choice: Choice,
    *,
    by: str,
    why: str,
    version: str | None = None,
    policy: GateConfig | None = None,
) -> dict[str, Any]:
    """Carry out a person's decision on a waiting version (None: the candidate), once; `by` and `why` are recorded.

    An approved version is held against its evidence and the present champion once more, as `promote` does, whose keys
    are returned, with `approval`: the state. An answer that comes too late changes nothing: HOLD. The same answer by
    the same person again is success. Raises RegistryError for another one, and where nothing waits.
    """
    check_reason(why)
    if not by.strip():
        raise RegistryError("a decision needs a name: say who decides, for the record")
    client = existing_registry(tracking_uri)
    wanted = _wanted(client, model_name, version)
    approval = _asked(wanted)
    if approval.overdue:
        approval = _expire(client, wanted, approval)
    given: State = "approved" if choice == "approve" else "declined"
    if approval.state == "waiting":
        approval = replace(approval, state=given, by=by, why=why, at=_text(datetime.now(UTC)))
        return _carry_out(client, wanted, approval, policy)
    if approval.state == "expired":
        reason = f"Nobody decided on version {wanted.version} by {approval.deadline}; it is not promoted."
        return _held(client, wanted, approval, [reason])
    if (approval.state, approval.by) != (given, by):
        raise RegistryError(
            f"version {wanted.version} of {model_name!r} was {approval.state} by {approval.by} at {approval.at} "
            f"({approval.why}) already; to change that, see `qlora rollback`, or register anew"
        )
    return _carry_out(client, wanted, approval, policy)


def expire_overdue(tracking_uri: str, model_name: str, version: str | None = None) -> tuple[str, Approval] | None:
    """Close a version's (None: the candidate's) approval if its time is over: HOLD, recorded. None: nothing closed."""
    database = sqlite_file(tracking_uri)
    if database is not None and not database.is_file():
        return None
    client = existing_registry(tracking_uri)
    number = version or alias_version(client, model_name, CANDIDATE)
    if number is None:
        return None
    found = get_version(client, model_name, number)
    approval = read_approval(found)
    if approval is None or not approval.overdue:
        return None
    return number, _expire(client, found, approval)


def _carry_out(
    client: "MlflowClient", version: RegisteredVersion, approval: Approval, policy: GateConfig | None
) -> dict[str, Any]:
    """The deed first, then the tag: whoever dies in between does it again, and an alias or a log takes it only once."""
    if approval.state == "approved":
        outcome = promote(
            client.tracking_uri, version.name, version.version, policy, by=approval.by, approval=approval.why
        )
        if outcome["verdict"] != "PROMOTE":
            return {**outcome, "approval": "waiting"}
        _write(client, version, approval)
        clear_candidate(client, version)
        return {**outcome, "approval": approval.state}
    log_decline(client, version, approval.why or "", approval.by)
    _write(client, version, approval)
    clear_candidate(client, version)
    return _held(client, version, approval, [f"Declined by {approval.by}: {approval.why}"])


def _expire(client: "MlflowClient", version: RegisteredVersion, approval: Approval) -> Approval:
    closed = replace(approval, state="expired", at=_text(datetime.now(UTC)))
    log_decline(client, version, f"No decision by {approval.deadline}.", None)
    _write(client, version, closed)
    clear_candidate(client, version)
    return closed


def _held(client: "MlflowClient", version: RegisteredVersion, approval: Approval, reasons: list[str]) -> dict[str, Any]:
    return champion_stays(client, version, "HOLD", reasons) | {"approval": approval.state}


def _wanted(client: "MlflowClient", model_name: str, version: str | None) -> RegisteredVersion:
    number = version if version is not None else alias_version(client, model_name, CANDIDATE)
    if number is None:
        raise RegistryError(
            f"{model_name!r} has no {CANDIDATE} that waits for a decision; name a version, or see `qlora history`"
        )
    return get_version(client, model_name, number)


def _asked(version: RegisteredVersion) -> Approval:
    approval = read_approval(version)
    if approval is None:
        raise RegistryError(
            f"version {version.version} of {version.name!r} waits for no decision: gate.approve was not manual, or the "
            "gate said no; see `qlora promote`"
        )
    return approval


def _write(client: "MlflowClient", version: RegisteredVersion, approval: Approval) -> None:
    set_version_tag(client, version, APPROVAL_TAG, canonical_json(asdict(approval)).decode())


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
