"""Promotion of a registered version as a task, with its verdict in Prefect's UI."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from qlora_core.config.load import load_config
from qlora_core.pipeline.champion_lease import champion_lease
from qlora_core.registry.promotion import promote
from tasks.stage_run import TASK_OPTIONS, library_logs, worth_retrying


@task(name="promote-adapter", task_run_name="promote {config}", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def promote_adapter(config: str, overrides: list[str], version: str | None) -> dict[str, Any]:
    """Decide again from the version's recorded evidence; the champion alias moves on PROMOTE only."""
    loaded = load_config(Path(config), overrides)
    with library_logs(), champion_lease(loaded):
        outcome = promote(loaded.tracking_uri, loaded.registry.model_name, version=version, policy=loaded.gate)
    reasons = "\n".join(f"- {reason}" for reason in outcome["reasons"])
    champion = outcome["champion"] or "none"
    create_markdown_artifact(key="verdict", markdown=f"## {outcome['verdict']}\n\nchampion: {champion}\n\n{reasons}")
    return outcome
