"""The sweep alone, after whatever it needs."""

from typing import Any

from prefect import flow

from tasks.begin_run import begin_run
from tasks.curate_data import curate_data
from tasks.make_base import make_base
from tasks.quantize_base import quantize_base
from tasks.sweep_adapters import sweep_adapters


@flow(name="sweep", flow_run_name="sweep {config}", persist_result=False, result_serializer="json")
def sweep(config: str = "pipeline.yaml", overrides: list[str] | None = None) -> list[dict[str, Any]]:
    """Train the trials of the sweep and keep the best adapter in the store.

    Args:
        config: path of the pipeline config.
        overrides: settings laid over it, each "section.key=value".

    Returns:
        The stages: name, key, cached, seconds.
    """
    spec = begin_run(config, overrides or [])
    stages = make_base(spec)
    return [*stages, curate_data(spec), quantize_base(spec), sweep_adapters(spec)]
