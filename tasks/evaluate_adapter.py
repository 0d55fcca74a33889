"""Evaluation of the best adapter as a task."""

from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from qlora_core.pipeline.run_record import headline
from tasks.stage_run import TASK_OPTIONS, Spec, run_stage, worth_retrying


@task(
    name="evaluate-adapter",
    task_run_name="evaluate-adapter {spec[run_id]}",
    retry_condition_fn=worth_retrying,
    **TASK_OPTIONS,
)
def evaluate_adapter(spec: Spec) -> dict[str, Any]:
    """Held-out loss, exact match and the judge's verdicts, each with its interval."""
    pipeline, row = run_stage(spec, "evaluate")
    lines = headline(pipeline.document("evaluate", "evaluation.json"))
    create_markdown_artifact(key="evaluation", markdown="\n\n".join(lines))
    return row
