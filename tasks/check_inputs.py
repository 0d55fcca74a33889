"""Whether there is anything to do at all, before anything heavy is imported."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from qlora_core.config.load import load_config
from qlora_core.pipeline.decided import check_inputs as compare_inputs
from qlora_core.telemetry import disable_usage_reporting
from tasks.stage_run import TASK_OPTIONS, library_logs, worth_retrying


@task(name="check-inputs", task_run_name="check-inputs {config}", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def check_inputs(config: str, overrides: list[str]) -> dict[str, Any] | None:
    """The answer where data, base and settings are those of the last decided run; None where there is work to do."""
    disable_usage_reporting()
    with library_logs():
        check = compare_inputs(load_config(Path(config), overrides))
    answer = check.to_json() if check.unchanged else None
    what = "\n".join(f"- {change}" for change in check.changes)
    last = check.last["summary"] if check.last else None
    told = f"Last decided run: `{last['run_id']}`, {last['verdict']}." if last else ""
    lead = f"## {answer['skipped']}" if answer else f"## To do\n\n{what}"
    create_markdown_artifact(key="inputs", markdown=f"{lead}\n\n{told}")
    return answer
