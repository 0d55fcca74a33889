"""What nobody else does: questions that are answered or too old are closed, and the automations are kept in place."""

from typing import Any

from prefect import flow

from tasks.close_approvals import close_approvals
from tasks.keep_automations import keep_automations


@flow(name="tidy", flow_run_name="tidy {config}", persist_result=False, result_serializer="json")
def tidy(config: str = "pipeline.yaml", alert_block: str | None = None, stuck_after_s: int = 540) -> dict[str, Any]:
    """Close approvals, wake the runs that waited for them, keep the automations.

    Args:
        config: path of the pipeline config.
        alert_block: notification block that hears of failed runs, as "type/name"; None: nobody is told.
        stuck_after_s: silence after which a run counts as dead, in seconds; three heartbeats.

    Returns:
        {"approvals": those closed, "automations": the names of those kept}.
    """
    automations = keep_automations(alert_block, stuck_after_s)
    return {"approvals": close_approvals(config), "automations": automations}
