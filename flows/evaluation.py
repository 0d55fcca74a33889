"""The evaluation alone, after whatever it needs, with the gate's verdict and the report; nothing is registered."""

from typing import Any

from prefect import flow

from tasks.begin_run import begin_run
from tasks.curate_data import curate_data
from tasks.decide_promotion import decide_promotion
from tasks.evaluate_adapter import evaluate_adapter
from tasks.make_base import make_base
from tasks.quantize_base import quantize_base
from tasks.sweep_adapters import sweep_adapters


@flow(name="evaluate", flow_run_name="evaluate {config}", persist_result=False, result_serializer="json")
def evaluate(config: str = "pipeline.yaml", overrides: list[str] | None = None) -> dict[str, Any]:
    """Measure the best adapter of the sweep on held-out rows.

    Args:
        config: path of the pipeline config.
        overrides: settings laid over it, each "section.key=value".

    Returns:
        {"stages": the stages' rows, "verdict": what the gate would decide}.
    """
    spec = begin_run(config, overrides or [])
    stages = make_base(spec)
    stages += [curate_data(spec), quantize_base(spec), sweep_adapters(spec), evaluate_adapter(spec)]
    gate = decide_promotion(spec)
    return {"stages": [*stages, gate["row"]], "verdict": gate["verdict"]}
