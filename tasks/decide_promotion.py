"""The gate as a task, with its verdict in Prefect's UI."""

from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from qlora_core.pipeline.promotion import Promotion
from tasks.stage_run import TASK_OPTIONS, Spec, library_logs, pipeline_of, worth_retrying


@task(
    name="decide-promotion",
    task_run_name="decide-promotion {spec[run_id]}",
    retry_condition_fn=worth_retrying,
    **TASK_OPTIONS,
)
def decide_promotion(spec: Spec) -> dict[str, Any]:
    """The verdict on the candidate, against the champion of the moment or, without one, the base."""
    with library_logs():
        gate = Promotion(pipeline_of(spec)).gate()
    reasons = "\n".join(f"- {reason}" for reason in gate.decision["reasons"])
    create_markdown_artifact(key="verdict", markdown=f"## {gate.decision['verdict']}\n\n{reasons}")
    return {"row": gate.result.row(), "verdict": gate.decision["verdict"]}
