"""The shadow period: a candidate answers beside the champion until its time is over or a rule sends it back."""

from typing import Any

from prefect import flow

from tasks.shadow_candidate import shadow_candidate


@flow(name="shadow", flow_run_name="shadow {config}", persist_result=False, result_serializer="json")
def shadow(config: str = "pipeline.yaml", overrides: list[str] | None = None) -> dict[str, Any]:
    """One round over what users asked since the last one.

    Args:
        config: path of the pipeline config; its gate.shadow section holds the rules and names the prompts.
        overrides: settings laid over it, each "section.key=value".

    Returns:
        {"version", "state", "answered", "figures", "outcome"}; version null where no candidate is in its period.
    """
    return shadow_candidate(config, overrides or [])
