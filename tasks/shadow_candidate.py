"""A round of the shadow period as a task, with its figures in Prefect's UI."""

import json
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from qlora_core.config.load import load_config
from qlora_core.pipeline.shadow import shadow_round
from tasks.stage_run import TASK_OPTIONS, library_logs, worth_retrying


@task(name="shadow-candidate", task_run_name="shadow {config}", retry_condition_fn=worth_retrying, **TASK_OPTIONS)
def shadow_candidate(config: str, overrides: list[str]) -> dict[str, Any]:
    """Champion and candidate answer the new prompts; the candidate is promoted, demoted, or goes on."""
    with library_logs():
        found = shadow_round(load_config(Path(config), overrides))
    if found["version"] is not None:
        outcome = found["outcome"] or {"verdict": "HOLD", "reasons": []}
        reasons = "\n".join(f"- {reason}" for reason in outcome["reasons"])
        figures = json.dumps(found["figures"], indent=1)
        create_markdown_artifact(
            key="shadow",
            markdown=f"## Candidate version {found['version']}: {found['state']}\n\n{reasons}\n\n    "
            + figures.replace("\n", "\n    "),
        )
    return found
