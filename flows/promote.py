"""Promotion alone: a registered version, decided on again, made champion if the gate says so."""

from typing import Any

from prefect import flow

from tasks.promote_adapter import promote_adapter


@flow(name="promote", flow_run_name="promote {config}", persist_result=False, result_serializer="json")
def promote(
    config: str = "pipeline.yaml", version: str | None = None, overrides: list[str] | None = None
) -> dict[str, Any]:
    """Move the champion alias to a registered version, if its evidence holds.

    Args:
        config: path of the pipeline config; its registry and gate sections are used.
        version: the registered version; None means the challenger.
        overrides: settings laid over the config, each "section.key=value".

    Returns:
        {"verdict", "reasons", "champion", ...}, as `qlora promote --json` prints it.
    """
    return promote_adapter(config, overrides or [], version)
