"""The whole job: data in, a registered and judged adapter out."""

from typing import Any

from prefect import flow

from tasks.begin_run import begin_run
from tasks.curate_data import curate_data
from tasks.decide_promotion import decide_promotion
from tasks.evaluate_adapter import evaluate_adapter
from tasks.finish_run import finish_run
from tasks.make_base import make_base
from tasks.quantize_base import quantize_base
from tasks.register_adapter import register_adapter
from tasks.sweep_adapters import sweep_adapters


@flow(name="retrain", flow_run_name="retrain {config}", persist_result=False, result_serializer="json")
def retrain(config: str = "pipeline.yaml", overrides: list[str] | None = None) -> dict[str, Any]:
    """Curate, quantize, sweep, evaluate, gate, register.

    Args:
        config: path of the pipeline config.
        overrides: settings laid over it, each "section.key=value".

    Returns:
        The run's summary, as `qlora run --json` prints it.
    """
    spec = begin_run(config, overrides or [])
    stages = make_base(spec)
    stages.append(curate_data(spec))
    stages.append(quantize_base(spec))
    stages.append(sweep_adapters(spec))
    stages.append(evaluate_adapter(spec))
    gate = decide_promotion(spec)
    registered = register_adapter(spec)
    return finish_run(spec, [*stages, gate["row"], registered])
