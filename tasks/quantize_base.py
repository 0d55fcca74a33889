"""Quantization as a task."""

from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from tasks.stage_run import TASK_OPTIONS, Spec, run_stage, worth_retrying


@task(
    name="quantize-base",
    task_run_name="quantize-base {spec[run_id]}",
    retry_condition_fn=worth_retrying,
    **TASK_OPTIONS,
)
def quantize_base(spec: Spec) -> dict[str, Any]:
    """The base in four bits, with its error beside it."""
    pipeline, row = run_stage(spec, "quantize")
    made = pipeline.document("quantize", "quantization.json")
    create_markdown_artifact(
        key="quantization",
        markdown=f"{made['parameters']:,} parameters, {made['bits_per_parameter']:.3f} bits per quantized parameter, "
        f"relative L2 error {made['relative_l2']:.4f}",
    )
    return row
