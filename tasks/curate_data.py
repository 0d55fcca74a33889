"""Curation as a task, with its funnel as a table in Prefect's UI."""

from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact

from tasks.stage_run import TASK_OPTIONS, Spec, run_stage, worth_retrying


@task(name="curate-data", task_run_name="curate-data {spec[run_id]}", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def curate_data(spec: Spec) -> dict[str, Any]:
    """Rows in, rows kept, and where the others went."""
    pipeline, row = run_stage(spec, "curate")
    curation = pipeline.document("curate", "curation.json")
    funnel = [{"source": source, **counts} for source, counts in curation["by_source"].items()]
    create_table_artifact(
        key="curation-funnel",
        table=[*funnel, {"source": "all", **curation["rows"]}],
        description=f"Splits {curation['splits']}; dropped by rule {curation['reasons']}",
    )
    return row
