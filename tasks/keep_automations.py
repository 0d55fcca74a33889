"""Prefect's automations that this project relies on, made and kept as they should be: alerts, and runs that are stuck.

A worker that dies together with its flow leaves a run that says Running for ever; only its missing heartbeat shows it.
Knows nothing of what the runs do.
"""

from datetime import timedelta
from typing import Any

from prefect import task
from prefect.automations import Automation
from prefect.blocks.core import Block
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture

from tasks.stage_run import TASK_OPTIONS, worth_retrying

STUCK = "qlora: stuck runs crash"
ALERT = "qlora: failures alert"
_TAG = "prefect.tag.qlora"
_ENDS = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut")}
# A suspended run has no process, so that it sends no heartbeat and is none the worse for it.
_RESTS = {f"prefect.flow-run.{name}" for name in ("Suspended", "Paused", "AwaitingRetry", "Resuming", "Late")}
_HEARTBEAT = "prefect.flow-run.heartbeat"


@task(name="keep-automations", task_run_name="keep-automations", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def keep_automations(alert_block: str | None, stuck_after_s: int) -> list[str]:
    """Make the automations, or bring them up to date; their names. Without `alert_block` there is none that alerts.

    `alert_block` names a notification block as `type/name`, such as `slack-webhook/on-call`. `stuck_after_s` should be
    three heartbeats (PREFECT_FLOWS_HEARTBEAT_FREQUENCY, in seconds), and is at least 10.
    """
    wanted = [stuck_automation(stuck_after_s)]
    if alert_block is not None:
        wanted.append(alert_automation(alert_block))
    for automation in wanted:
        _keep(automation)
    return [automation.name for automation in wanted]


def stuck_automation(stuck_after_s: int) -> Automation:
    """A run that sent heartbeats, has not ended, and is silent for `stuck_after_s` seconds becomes Crashed."""
    return Automation(
        name=STUCK,
        description="A run whose process is gone says so, and the next one may begin.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match=_resource("prefect.flow-run.*"),
            match_related=_tagged(),
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *_ENDS, *_RESTS},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=stuck_after_s),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message=f"no sign of life for {stuck_after_s} s; run it again",
                force=False,
            )
        ],
    )


def alert_automation(alert_block: str) -> Automation:
    """A run that failed, crashed or ran out of time is told to whom the notification block reaches.

    Raises ValueError where there is no such block.
    """
    block: Any = Block.load(alert_block)
    return Automation(
        name=ALERT,
        description="Somebody hears of every failed run.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            match=_resource("prefect.flow-run.*"),
            match_related=_tagged(),
            expect={f"prefect.flow-run.{name}" for name in ("Failed", "Crashed", "TimedOut")},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=0),
        ),
        actions=[
            SendNotification(
                block_document_id=block._block_document_id,
                subject="{{ flow.name }}: {{ flow_run.state.name }}",
                body="{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
            )
        ],
    )


def _keep(automation: Automation) -> None:
    read: Any = Automation.read  # typed as if it were awaited, which in a task it is not
    try:
        automation.id = read(name=automation.name).id
    except ValueError:
        automation.create()
        return
    automation.update()


def _resource(pattern: str) -> Any:
    return {"prefect.resource.id": pattern}


def _tagged() -> Any:
    return {"prefect.resource.role": "tag", "prefect.resource.id": _TAG}
