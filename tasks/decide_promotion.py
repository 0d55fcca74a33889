"""The gate as a task, with its verdict in Prefect's UI."""

from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from qlora_core.pipeline.findings import finding_lines
from qlora_core.pipeline.promotion import Gate, Promotion
from qlora_core.pipeline.run_record import headline
from qlora_core.report.decision_page import decision_page
from tasks.stage_run import TASK_OPTIONS, Spec, library_logs, pipeline_of, worth_retrying


@task(
    name="decide-promotion",
    task_run_name="decide-promotion {spec[run_id]}",
    retry_condition_fn=worth_retrying,
    **TASK_OPTIONS,
)
def decide_promotion(spec: Spec) -> dict[str, Any]:
    """The verdict on the candidate, against the champion of the moment or, without one, the base."""
    with library_logs():
        promotion = Promotion(pipeline_of(spec))
        gate = promotion.gate()
    reasons = "\n".join(f"- {reason}" for reason in gate.decision["reasons"])
    create_markdown_artifact(key="verdict", markdown=f"## {gate.decision['verdict']}\n\n{reasons}")
    create_markdown_artifact(key="decision", markdown=_page(promotion, gate, spec["run_id"]))
    _show_findings(gate)
    return {"row": gate.result.row(), "verdict": gate.decision["verdict"]}


def _page(promotion: Promotion, gate: Gate, run_id: str) -> str:
    champion = gate.decision["champion"]
    return decision_page(
        gate.decision["verdict"],
        gate.decision["reasons"],
        compared_with=f"champion version {champion}" if champion else "the base, there being no champion",
        figures=headline(promotion.pipeline.document("evaluate", "evaluation.json")),
        findings=finding_lines(gate.drift, gate.diagnosis),
        links={"run": run_id, "report": str(gate.report), "MLflow model": promotion.job.config.registry.model_name},
    )


def _show_findings(gate: Gate) -> None:
    drift, weak = finding_lines(gate.drift, gate.diagnosis)
    create_markdown_artifact(key="drift", markdown="\n".join(f"- {line}" for line in drift))
    table = [{key: value for key, value in one.items() if key != "like"} for one in gate.diagnosis["requests"]]
    create_table_artifact(key="data-requests", table=table, description="\n\n".join(weak) or "No slice is worse.")
