"""A flow that waits for a person: suspended until somebody decides in Prefect's UI or with `qlora promote`.

Suspension ends the process and frees the worker; the resumed run begins again at the top of the flow. Only runs of
deployments can be resumed, so that a run started by hand does not wait: its version stays `candidate`, and HOLD.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from prefect import get_client, suspend_flow_run, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.input import RunInput
from pydantic import Field

from qlora_core.config.load import load_config
from qlora_core.pipeline.champion_lease import champion_lease
from qlora_core.registry.approval import Approval, answer, note_flow_run
from tasks.stage_run import TASK_OPTIONS, library_logs, worth_retrying

_PAUSE = "approve-"
_MARGIN_S = 7 * 86400
"""Prefect fails a run whose pause is over; the approval is over this much earlier, and the run is woken to say so."""


class Decision(RunInput):
    """The form that Prefect's UI shows: what is decided on the candidate, by whom, and why."""

    decision: Literal["approve", "decline"]
    by: str = Field(min_length=1, max_length=200)
    why: str = Field(min_length=1, max_length=1000)


def awaited_version() -> str | None:
    """The version whose approval this flow run asked for before it was suspended; None for a run that begins."""
    policy = _this_run().empirical_policy
    keys = [key for key in policy.pause_keys or () if key.startswith(_PAUSE)]
    return keys[0].removeprefix(_PAUSE) if keys else None


@task(name="begin-waiting", task_run_name="ask about version {version}", **TASK_OPTIONS)
def _begin_waiting(config: str, overrides: list[str], version: str, flow_run: str) -> Approval:
    """Remember with the version which flow run waits for the decision, so that `qlora promote` can wake it."""
    loaded = load_config(Path(config), overrides)
    name = loaded.registry.model_name
    with library_logs(), champion_lease(loaded):
        approval = note_flow_run(loaded.tracking_uri, name, version, flow_run)
    create_markdown_artifact(
        key="approval",
        markdown=f"## `models:/{name}/{version}` waits for a decision until {approval.deadline}\n\n"
        "Resume this flow run and fill in the form, or:\n\n"
        f"    qlora promote {config} --version {version} --approve --by WHO --reason WHY\n"
        f"    qlora promote {config} --version {version} --decline --by WHO --reason WHY\n\n"
        "The page `decision` says what it rests on. Without an answer it stays HOLD.",
    )
    return approval


def wait_for_decision(config: str, overrides: list[str], version: str) -> dict[str, str] | None:
    """Suspend the flow run until somebody decides on the version: decision, by, why. None for one that cannot wait."""
    run = _this_run()
    if run.deployment_id is None:
        return None
    approval = _begin_waiting(config, overrides, version, str(run.id))
    if approval.state != "waiting":
        decided = "approve" if approval.state == "approved" else "decline"
        return {"decision": decided, "by": approval.by or "nobody", "why": approval.why or "no decision in time"}
    given = suspend_flow_run(Decision, timeout=int(approval.seconds_left + _MARGIN_S), key=f"{_PAUSE}{version}")
    assert given is not None
    return {"decision": given.decision, "by": given.by, "why": given.why}


@task(
    name="carry-out-decision",
    task_run_name="carry out the decision on version {version}",
    retry_condition_fn=worth_retrying,
    **TASK_OPTIONS,
)
def carry_out_decision(config: str, overrides: list[str], version: str, decision: Mapping[str, Any]) -> dict[str, Any]:
    """Promote or hold the version as decided; who decided and why goes into the promotion log."""
    loaded = load_config(Path(config), overrides)
    choice: Literal["approve", "decline"] = "approve" if decision["decision"] == "approve" else "decline"
    with library_logs(), champion_lease(loaded):
        outcome = answer(
            loaded.tracking_uri,
            loaded.registry.model_name,
            choice,
            by=decision["by"],
            why=decision["why"],
            version=version,
            policy=loaded.gate,
        )
    reasons = "\n".join(f"- {reason}" for reason in outcome["reasons"])
    create_markdown_artifact(
        key="approval",
        markdown=f"## {outcome['verdict']}: {outcome['approval']} by {decision['by']}\n\n{decision['why']}\n\n"
        f"champion: {outcome['champion'] or 'none'}\n\n{reasons}",
    )
    return outcome


def _this_run() -> FlowRun:
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None, "only a flow asks and waits"
    return context.flow_run


def wake(flow_run: str, decision: Mapping[str, str]) -> str | None:
    """Let a suspended flow run go on with a decision; why that could not be, or None where it goes on."""
    with get_client(sync_client=True) as client:
        try:
            result = client.resume_flow_run(UUID(flow_run), run_input=dict(decision))
        except ObjectNotFound:
            return "this Prefect server does not know it"
        except OSError as error:
            return f"the Prefect server does not answer: {error}"
    if result.status.value == "ACCEPT":
        return None
    return getattr(result.details, "reason", None) or f"the Prefect server said {result.status.value}"
