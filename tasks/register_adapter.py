"""Registration as a task, with a link to the registered version."""

import time
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from qlora_core.pipeline.promotion import Promotion
from tasks.stage_run import TASK_OPTIONS, Spec, library_logs, pipeline_of, worth_retrying


@task(
    name="register-adapter",
    task_run_name="register-adapter {spec[run_id]}",
    retry_condition_fn=worth_retrying,
    **TASK_OPTIONS,
)
def register_adapter(spec: Spec) -> dict[str, Any]:
    """One registered version a candidate, however often this runs; aliases move after the clean-process check."""
    promotion = Promotion(pipeline_of(spec))
    started = time.monotonic()
    with library_logs():
        registration, cached = promotion.register()
    name, version = promotion.job.config.registry.model_name, registration["version"]
    create_markdown_artifact(
        key="registered-version",
        markdown=f"`models:/{name}/{version}`, aliases: {', '.join(registration['aliases']) or 'none'}",
    )
    return promotion.row(cached=cached, seconds=time.monotonic() - started)
