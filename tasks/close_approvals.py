"""Runs that wait for a person in vain: the time for an answer is over, or it was given elsewhere. They are woken."""

from pathlib import Path
from typing import Any

from prefect import get_client, task
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType

from qlora_core.config.load import load_config
from qlora_core.pipeline.champion_lease import champion_lease
from qlora_core.registry.approval import approval_of, awaited_by, expire_overdue
from tasks.ask_approval import wake
from tasks.stage_run import TASK_OPTIONS, library_logs, worth_retrying


@task(name="close-approvals", task_run_name="close-approvals", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def close_approvals(config: str) -> list[dict[str, Any]]:
    """Close the config's overdue approval (HOLD) and wake every suspended run whose question is answered.

    Returns a row for each: `version`, `approval` (its state), `flow_run` (None: none waited) and `problem`.
    """
    with library_logs():
        rows = [_closed(run) for run in _suspended()]
        told = [row for row in rows if row is not None]
        told += _expired(config, [], waiting=None)
    create_table_artifact(key="approvals-closed", table=told, description=f"{len(told)} approvals closed")
    return told


def _suspended() -> list[FlowRun]:
    paused = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"])), flow_run_filter=FlowRunFilter(state=paused)
        )


def _closed(run: FlowRun) -> dict[str, Any] | None:
    """What became of a suspended run; None while its question is open."""
    config, overrides = run.parameters["config"], run.parameters.get("overrides") or []
    loaded = load_config(Path(config), overrides)
    where = (loaded.tracking_uri, loaded.registry.model_name)
    version = awaited_by(*where, str(run.id))
    if version is None:
        return None
    _expired(config, overrides, waiting=version)
    _, approval = approval_of(*where, version)
    if approval.state == "waiting":
        return None
    decision = {
        "decision": "approve" if approval.state == "approved" else "decline",
        "by": approval.by or "nobody",
        "why": approval.why or f"no decision by {approval.deadline}",
    }
    return {
        "version": version,
        "approval": approval.state,
        "flow_run": str(run.id),
        "problem": wake(str(run.id), decision),
    }


def _expired(config: str, overrides: list[str], *, waiting: str | None) -> list[dict[str, Any]]:
    loaded = load_config(Path(config), overrides)
    with champion_lease(loaded):
        closed = expire_overdue(loaded.tracking_uri, loaded.registry.model_name, waiting)
    if closed is None:
        return []
    version, approval = closed
    return [{"version": version, "approval": approval.state, "flow_run": None, "problem": None}]
