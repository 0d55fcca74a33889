"""Write a run's summary."""

from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact

from qlora_core.pipeline.promotion import Promotion
from qlora_core.pipeline.run_record import RunRecord
from tasks.stage_run import TASK_OPTIONS, Spec, library_logs, pipeline_of, worth_retrying


@task(name="finish-run", task_run_name="finish-run {spec[run_id]}", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def finish_run(spec: Spec, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's result, with a link to its report."""
    with library_logs():
        summary = RunRecord.from_spec(spec).summary(Promotion(pipeline_of(spec)), stages)
    create_link_artifact(key="report", link=f"file://{summary['report']}", link_text="Run report")
    return summary
