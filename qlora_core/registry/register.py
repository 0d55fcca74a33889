"""The registration stage: log the sweep, register its adapter, prove it loads, move the aliases.

Puts the package's parts in order and writes `registration.json`. Running it twice with one `run_key` registers once.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.config.gate import GateConfig
from qlora_core.errors import RegistryError
from qlora_core.registry.aliases import CHALLENGER, former_champions, move_champion, set_alias
from qlora_core.registry.connection import connect, find_or_create_experiment, registry_lock
from qlora_core.registry.evidence import champion_changed, compared_champion, evidence_for, write_evidence
from qlora_core.registry.gate import decide
from qlora_core.registry.load_check import LOAD_CHECK_TAG, PASSED, check_version
from qlora_core.registry.registration import finish_registration, start_registration
from qlora_core.registry.tracking import SweepRecord, log_sweep
from qlora_core.registry.versions import RegisteredVersion, register_adapter, set_version_tag, verify_version

if TYPE_CHECKING:
    from mlflow import MlflowClient

REPORT_FILE = "report.html"
EVIDENCE_FILE = "evidence.json"
_FIGURES = {
    "heldout": ("base_loss", "adapter_loss", "gain", "gain_low", "gain_high"),
    "exact_match": ("base", "adapter", "difference", "low", "high"),
    "judge": ("win_rate", "low", "high", "scored", "unscored", "cost_usd"),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegistrationRequest:
    """Everything one registration needs.

    `config` is the resolved pipeline config. `decision` has "verdict", "reasons", "comparison" (with the champion of
    the moment, as the gate takes it; null: with the base) and "compared_with" (that champion's adapter digest, or
    "none"). `lineage` names all of LINEAGE_TAGS. `run_key` identifies the candidate: a retry with it repeats nothing.
    """

    tracking_uri: str
    model_name: str
    experiment: str
    work_dir: Path
    config: Mapping[str, Any]
    sweep_folder: Path
    evaluation_folder: Path
    quantized_folder: Path
    report: Path | None
    decision: Mapping[str, Any]
    lineage: Mapping[str, str]
    run_key: str


def register_run(request: RegistrationRequest, out: Path) -> dict[str, Any]:
    """Register a job's best adapter; returns what it writes to `out`/registration.json (beside evidence.json and a
    copy of the report).

    Order: runs, version, evidence, load in a clean process, alias `challenger`, and for PROMOTE alias `champion`. A
    failed check raises RegistryError with no alias moved. A champion that changed since the comparison turns PROMOTE
    into HOLD, which is not recorded as done: the next run compares with the new champion. Keys: model_name, version,
    run_id, verdict, reasons, aliases, champion_before, compared_with, report.
    """
    evaluation = _read_json(request.evaluation_folder / "evaluation.json")
    policy = GateConfig.model_validate(request.config["gate"])
    comparison = request.decision.get("comparison")
    _check_decision(request, evaluation, policy)
    client = connect(request.tracking_uri)
    with registry_lock(request.tracking_uri):
        version = _register(client, request, evaluation)
    evidence = evidence_for(
        version, evaluation=evaluation, champion=comparison, policy=policy, decision=request.decision
    )
    write_evidence(client, version, evidence)
    (out / EVIDENCE_FILE).write_text(json.dumps(evidence, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _prove(client, version, request.quantized_folder)
    registration = _move_aliases(client, version, _planned(client, request, version), compared_champion(comparison))
    if request.report is not None:
        shutil.copyfile(request.report, out / REPORT_FILE)
    (out / "registration.json").write_text(json.dumps(registration, indent=2), encoding="utf-8")
    return registration


def _register(client: "MlflowClient", request: RegistrationRequest, evaluation: Mapping[str, Any]) -> RegisteredVersion:
    record = SweepRecord(
        run_key=request.run_key,
        name=f"{request.model_name} sweep {request.run_key[:8]}",
        config=request.config,
        sweep=_read_json(request.sweep_folder / "sweep.json"),
        data_digest=request.lineage.get("data_digest", ""),
        tags=request.lineage,
        metrics=_metrics(evaluation),
        files=(request.evaluation_folder / "evaluation.json", *([request.report] if request.report else [])),
    )
    experiment_id = find_or_create_experiment(client, request.experiment, request.work_dir)
    return register_adapter(
        client,
        request.model_name,
        request.sweep_folder / "adapter",
        run_id=log_sweep(client, experiment_id, record),
        run_key=request.run_key,
        lineage=request.lineage,
    )


def _prove(client: "MlflowClient", version: RegisteredVersion, quantized_folder: Path) -> None:
    """Load in a clean process; on a retry after that was shown, only the bytes are verified again."""
    if version.tags.get(LOAD_CHECK_TAG) == PASSED:
        verify_version(client, version)
        return
    figures = check_version(client.tracking_uri, version, quantized_folder)
    set_version_tag(client, version, LOAD_CHECK_TAG, PASSED)
    _log.info(
        "version %s loads in a clean process: %d golden prompts, largest difference %.1e, %.0f s",
        version.version,
        figures["prompts"],
        figures["max_difference"],
        figures["seconds"],
    )


def _planned(client: "MlflowClient", request: RegistrationRequest, version: RegisteredVersion) -> dict[str, Any]:
    """The registration as it will be; on a retry after the move, `champion_before` is the one this version replaced."""
    line = [former for former in former_champions(client, request.model_name) if former != version.version]
    return {
        "model_name": request.model_name,
        "version": version.version,
        "run_id": version.run_id,
        "verdict": request.decision["verdict"],
        "reasons": list(request.decision["reasons"]),
        "aliases": [],
        "champion_before": line[-1] if line else None,
        "compared_with": request.decision.get("compared_with", "none"),
        "report": REPORT_FILE if request.report is not None else None,
    }


def _move_aliases(
    client: "MlflowClient", version: RegisteredVersion, registration: dict[str, Any], expected: str | None
) -> dict[str, Any]:
    start_registration(client, version, registration)
    set_alias(client, version.name, CHALLENGER, version.version)
    if registration["verdict"] != "PROMOTE":
        return finish_registration(client, version, registration)
    reason = " ".join(registration["reasons"])
    outcome = move_champion(client, version.name, version.version, expected=expected, action="promote", reason=reason)
    if outcome.moved:
        return finish_registration(client, version, registration)
    reasons = [*registration["reasons"], champion_changed(expected, outcome.champion)]
    return {**registration, "verdict": "HOLD", "reasons": reasons, "aliases": [CHALLENGER]}


def _check_decision(request: RegistrationRequest, evaluation: Mapping[str, Any], policy: GateConfig) -> None:
    given, again = request.decision["verdict"], decide(evaluation, request.decision.get("comparison"), policy)
    if again.verdict != given:
        raise RegistryError(
            f"the decision handed over is {given}, and the evidence in {request.evaluation_folder} gives "
            f"{again.verdict} ({' '.join(again.reasons)}); decide on this evaluation and register again"
        )


def _metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The evaluation's figures as MLflow metrics, `heldout/gain` and so on; parts not measured are left out."""
    parts = {part: evaluation["metrics"].get(part) or {} for part in _FIGURES}
    return {
        f"{part}/{key}": float(parts[part][key])
        for part, keys in _FIGURES.items()
        for key in keys
        if parts[part].get(key) is not None
    }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RegistryError(f"no {path.name} in {path.parent}; run the stage that writes it before registering")
    return json.loads(path.read_bytes())
