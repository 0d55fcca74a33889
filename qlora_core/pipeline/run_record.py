"""One `qlora run` on record: its id, its resolved config, its summary and its report, in a folder of its own.

Knows what a run's result looks like to people and scripts. It does not run stages.
"""

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_core.config.load import parse_config
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.pipeline.decided import record_decided
from qlora_core.pipeline.findings import DRIFT_FILE, SLICES_FILE
from qlora_core.pipeline.inputs import Inputs, read_inputs
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.pipeline.promotion import Promotion
from qlora_core.pipeline.start_adapter import pin_start

_BESIDE_THE_REPORT = ("disagreements.html", DRIFT_FILE, SLICES_FILE)


@dataclass(frozen=True)
class RunRecord:
    """A run's id and config. `folder` holds config.json from the start and summary.json, report.html and what stands
    beside the report (disagreements.html, drift.json, worst_slices.json) at the end.

    `inputs` are those found before anything was read; what arrives later is for the next run.
    """

    run_id: str
    config: PipelineConfig
    inputs: Inputs

    @classmethod
    def start(cls, config: PipelineConfig) -> "RunRecord":
        """Give the run an id and save its resolved config, once all it reads from outside is known to be there."""
        inputs = read_inputs(config)
        config = pin_start(config)
        Pipeline(config).job.check_inputs()
        return cls._put_on_record(config, inputs)

    @classmethod
    def _put_on_record(cls, config: PipelineConfig, inputs: Inputs) -> "RunRecord":
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        record = cls(f"{stamp}-{secrets.token_hex(3)}", config, inputs)
        record.folder.mkdir(parents=True)
        document = json.dumps(config.resolved(), indent=1, ensure_ascii=False)
        (record.folder / "config.json").write_text(document, encoding="utf-8")
        return record

    @property
    def folder(self) -> Path:
        """Where this run's files are."""
        return self.config.work_dir / "runs" / self.run_id

    def spec(self) -> dict[str, Any]:
        """The run as plain JSON data, for what crosses process and service boundaries."""
        config = {"folder": str(self.config.folder), "config": self.config.resolved()}
        return {"run_id": self.run_id, **config, "inputs": dict(self.inputs)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "RunRecord":
        """The run that `spec` described."""
        return cls(spec["run_id"], parse_config(dict(spec["config"]), folder=Path(spec["folder"])), spec["inputs"])

    def summary(self, promotion: Promotion, stages: list[dict[str, Any]]) -> dict[str, Any]:
        """The result of a run whose stages have all run, saved beside its config; `stages` are their rows in order."""
        pipeline = promotion.pipeline
        gate = promotion.gate()
        swept = pipeline.document("sweep", "sweep.json")
        evaluation = pipeline.document("evaluate", "evaluation.json")
        registration, _ = promotion.register()
        for beside in _BESIDE_THE_REPORT:
            shutil.copy(gate.report.with_name(beside), self.folder / beside)
        summary = {
            "run_id": self.run_id,
            "stages": stages,
            "trials": trial_rows(swept),
            "best": swept["best"],
            "varied": swept["varied"],
            "metrics": evaluation["metrics"],
            "headline": headline(evaluation),
            # The registration's: a champion that changed since the decision turns PROMOTE into HOLD.
            "verdict": registration["verdict"],
            "reasons": registration["reasons"],
            "model_version": registration["version"],
            "approval": registration.get("approval"),
            "base": str(pipeline.run("quantize").artifact.path),
            "adapter": str(pipeline.run("sweep").artifact.path / "adapter"),
            "report": str(shutil.copy(gate.report, self.folder / "report.html")),
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        if promotion.settled:
            record_decided(pipeline.job.store, self.config.registry.model_name, self.inputs, summary)
        return summary


def finished_before(config: PipelineConfig) -> dict[str, Any] | None:
    """The summary, on record as a run of its own, if every stage is stored and the candidate registered; else None.

    Asks the store for each manifest twice, to plan and to read; nothing is tried out that only a build would need.
    """
    inputs = read_inputs(config)
    config = pin_start(config)
    pipeline = Pipeline(config)
    if not all(stage.cached for stage in pipeline.plan()):
        return None
    promotion = Promotion(pipeline)
    if promotion.registered is None and not promotion.reigns:
        return None
    promotion.gate()
    rows = [result.row() for result in pipeline.results()]
    record = RunRecord._put_on_record(config, inputs)
    return record.summary(promotion, [*rows, promotion.row(cached=True, seconds=0.0)])


def trial_rows(swept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials as commands report them: without their curves."""
    return [{key: trial[key] for key in _TRIAL_KEYS} for trial in swept["trials"]]


_TRIAL_KEYS = ("id", "params", "state", "loss", "steps", "seconds", "error")


def headline(evaluation: Mapping[str, Any]) -> list[str]:
    """What was measured, one sentence a measure, with its interval."""
    metrics = evaluation["metrics"]
    heldout = metrics["heldout"]
    lines = [
        f"held-out loss: base {heldout['base_loss']:.4f}, adapter {heldout['adapter_loss']:.4f}; gain "
        f"{heldout['gain']:.4f} [{heldout['gain_low']:.4f}, {heldout['gain_high']:.4f}] over {heldout['rows']} rows"
    ]
    exact = metrics["exact_match"]
    if exact is not None:
        lines.append(
            f"exact match: base {exact['base']:.1%}, adapter {exact['adapter']:.1%}; difference "
            f"{_points(exact['difference'])} [{_points(exact['low'])}, {_points(exact['high'])}] points over "
            f"{exact['prompts']} prompts"
        )
    judge = metrics["judge"]
    if judge is not None:
        lines.append(_judge_line(judge))
    return lines


def _points(difference: float) -> str:
    """A difference of two shares in percentage points: as a percentage it would read as one of the base's share."""
    return f"{100 * difference:+.1f}"


def _judge_line(judge: Mapping[str, Any]) -> str:
    who = f"judge ({judge['kind']}, {'certified' if judge['certified'] else 'uncertified: a hint, no evidence'})"
    counts = f"{judge['scored']} verdicts, {judge['unscored']} unscored"
    if judge["win_rate"] is None:
        return f"{who}: no win rate; {counts} {judge['unscored_reasons']}"
    agree = "" if judge["order_consistency"] is None else f", both orders agree in {judge['order_consistency']:.0%}"
    return f"{who}: adapter wins {judge['win_rate']:.1%} [{judge['low']:.1%}, {judge['high']:.1%}]; {counts}{agree}"
