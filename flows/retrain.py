"""The whole job: data in, a registered and judged adapter out."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.ask_approval import awaited_version, carry_out_decision, wait_for_decision
from tasks.begin_run import begin_run
from tasks.check_inputs import check_inputs
from tasks.curate_data import curate_data
from tasks.decide_promotion import decide_promotion
from tasks.evaluate_adapter import evaluate_adapter
from tasks.finish_run import finish_run
from tasks.make_base import make_base
from tasks.quantize_base import quantize_base
from tasks.register_adapter import register_adapter
from tasks.sweep_adapters import sweep_adapters


@flow(name="retrain", flow_run_name="retrain {config}", persist_result=False, result_serializer="json")
def retrain(
    config: str = "pipeline.yaml", overrides: list[str] | None = None, if_changed: bool = False
) -> dict[str, Any] | State[dict[str, Any]]:
    """Curate, quantize, sweep, evaluate, gate, register.

    Args:
        config: path of the pipeline config.
        overrides: settings laid over it, each "section.key=value".
        if_changed: do nothing where data, base and settings are those of the last decided run.

    Returns:
        The run's summary, as `qlora run --json` prints it.
    """
    overrides = overrides or []
    version, summary = awaited_version(), dict[str, Any]()
    if version is None:
        if if_changed and (known := check_inputs(config, overrides)) is not None:
            return Completed(message=known["skipped"], data=known)
        spec = begin_run(config, overrides)
        stages = make_base(spec)
        stages.append(curate_data(spec))
        stages.append(quantize_base(spec))
        stages.append(sweep_adapters(spec))
        stages.append(evaluate_adapter(spec))
        gate = decide_promotion(spec)
        registered = register_adapter(spec)
        summary = finish_run(spec, [*stages, gate["row"], registered])
        if summary["approval"] != "waiting":
            return summary
        version = summary["model_version"]
    decision = wait_for_decision(config, overrides, version)
    return carry_out_decision(config, overrides, version, decision) if decision else summary
