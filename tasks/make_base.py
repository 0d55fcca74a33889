"""Make the demo base model, for jobs whose base is `demo`; nothing for all others."""

from typing import Any

from prefect import task

from tasks.stage_run import TASK_OPTIONS, Spec, pipeline_of, run_stage, worth_retrying


@task(name="make-base", task_run_name="make-base {spec[run_id]}", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def make_base(spec: Spec) -> list[dict[str, Any]]:
    """The stage's row, or no row where the base is given."""
    if "base" not in pipeline_of(spec).stage_names:
        return []
    _, row = run_stage(spec, "base")
    return [row]
