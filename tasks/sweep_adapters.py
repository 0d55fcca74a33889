"""The sweep as a task, with its trials as a table in Prefect's UI."""

from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact

from qlora_core.pipeline.run_record import trial_rows
from tasks.cluster_turn import cluster_turn
from tasks.stage_run import TASK_OPTIONS, Spec, pipeline_of, run_stage, worth_retrying


@task(
    name="sweep-adapters",
    task_run_name="sweep-adapters {spec[run_id]}",
    retry_condition_fn=worth_retrying,
    **TASK_OPTIONS,
)
def sweep_adapters(spec: Spec) -> dict[str, Any]:
    """Every trial and the best of them. Ray is started, used and ended inside this one task."""
    with cluster_turn(pipeline_of(spec).job.config.compute):
        pipeline, row = run_stage(spec, "sweep")
    swept = pipeline.document("sweep", "sweep.json")
    table = [
        {**trial, "params": str(trial["params"]), "best": trial["id"] == swept["best"]} for trial in trial_rows(swept)
    ]
    create_table_artifact(key="sweep-trials", table=table, description=f"Best trial: {swept['best']}")
    return row
