"""Put a run on record: resolve and save its config, check the store."""

from pathlib import Path
from typing import Any

from prefect import task

from qlora_core.config.load import load_config
from qlora_core.pipeline.run_record import RunRecord
from qlora_core.telemetry import disable_usage_reporting
from tasks.stage_run import TASK_OPTIONS, worth_retrying


@task(name="begin-run", task_run_name="begin-run {config}", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def begin_run(config: str, overrides: list[str]) -> dict[str, Any]:
    """The run's description, plain JSON, which every other task takes."""
    disable_usage_reporting()
    return RunRecord.start(load_config(Path(config), overrides)).spec()
