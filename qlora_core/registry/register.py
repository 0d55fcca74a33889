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
from qlora_core.registry.aliases import CHALLENGER, CHAMPION, former_champions, move_champion, set_alias
from qlora_core.registry.connection import connect, find_or_create_experiment, registry_lock
from qlora_core.registry.evidence import compared_champion, evidence_for, write_evidence
from qlora_core.registry.gate import Decision, decide
from qlora_core.registry.load_check import check_version
from qlora_core.registry.tracking import SweepRecord, log_sweep
from qlora_core.registry.versions import Lineage, RegisteredVersion, get_version, register_adapter, set_version_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOAD_CHECK_TAG = "load_check"
_INTERVALS = {
    "heldout": ("base_loss", "adapter_loss", "gain", "gain_low", "gain_high"),
    "exact_match": ("base", "adapter", "difference", "low", "high"),
    "judge": ("win_rate", "low", "high", "scored", "unscored", "cost_usd"),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegistrationRequest:
    """Everything one registration needs.

    `config` is the resolved pipeline config. `champion` is the comparison with the present champion that `decision` was
    made on (None: with the base). `run_key` identifies the job: a retry with the same key changes nothing already done.
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
    decision: Decision
    champion: Mapping[str, Any] | None
    lineage: Lineage
    run_key: str


def register_run(request: RegistrationRequest, out: Path) -> dict[str, Any]:
    """Register a job's best adapter; returns what it writes to `out`/registration.json (beside a copy of the report).

    Order: runs, version, evidence, load in a clean process, alias `challenger`, and for PROMOTE alias `champion`. A
    failed check raises RegistryError with no alias moved. A champion that changed since the comparison turns PROMOTE
    into HOLD. Keys: model_name, version, run_id, verdict, reasons, aliases, champion_before, report.
    """
    evaluation = _read_json(request.evaluation_folder / "evaluation.json")
    policy = GateConfig.model_validate(request.config["gate"])
    _check_decision(request, evaluation, policy)
    client = connect(request.tracking_uri)
    with registry_lock(request.tracking_uri):
        version = _register(client, request, evaluation)
    evidence = evidence_for(
        version, evaluation=evaluation, champion=request.champion, policy=policy, decision=request.decision
    )
    write_evidence(client, version, evidence)
    figures = check_version(request.tracking_uri, version, request.quantized_folder)
    set_version_tag(client, version, LOAD_CHECK_TAG, "passed")
    _log.info("Version %s loads in a clean process (%s)", version.version, figures)
    champion_before = _champion_before(client, request.model_name, version.version)
    decision = _move_aliases(client, request, version)
    registration = {
        "model_name": request.model_name,
        "version": version.version,
        "run_id": version.run_id,
        "verdict": decision.verdict,
        "reasons": list(decision.reasons),
        "aliases": list(get_version(client, request.model_name, version.version).aliases),
        "champion_before": champion_before,
        "report": None,
    }
    if request.report is not None:
        registration["report"] = shutil.copy(request.report, out / "report.html").name
    (out / "registration.json").write_text(json.dumps(registration, indent=2))
    return registration


def _register(client: "MlflowClient", request: RegistrationRequest, evaluation: Mapping[str, Any]) -> RegisteredVersion:
    record = SweepRecord(
        run_key=request.run_key,
        name=f"{request.model_name} sweep {request.run_key[:8]}",
        config=request.config,
        sweep=_read_json(request.sweep_folder / "sweep.json"),
        data_digest=request.lineage.data_digest,
        tags=request.lineage.tags(),
        metrics=_metrics(evaluation),
        files=(request.evaluation_folder / "evaluation.json", *([request.report] if request.report else [])),
    )
    experiment_id = find_or_create_experiment(client, request.experiment, request.work_dir)
    run_id = log_sweep(client, experiment_id, record)
    return register_adapter(
        client,
        request.model_name,
        request.sweep_folder / "adapter",
        run_id=run_id,
        run_key=request.run_key,
        lineage=request.lineage,
    )


def _move_aliases(client: "MlflowClient", request: RegistrationRequest, version: RegisteredVersion) -> Decision:
    set_alias(client, request.model_name, CHALLENGER, version.version)
    if request.decision.verdict != "PROMOTE":
        return request.decision
    expected = compared_champion(request.champion)
    outcome = move_champion(
        client,
        request.model_name,
        version.version,
        expected=expected,
        action="promote",
        reason=" ".join(request.decision.reasons),
    )
    if outcome.moved:
        return request.decision
    return Decision("HOLD", (*request.decision.reasons, champion_changed(expected, outcome.champion)))


def champion_changed(expected: str | None, found: str | None) -> str:
    """Why a PROMOTE was not carried out: the champion is not the one the evidence speaks of."""
    compared = f"champion version {expected}" if expected else "the base, when there was no champion"
    now = f"version {found}" if found else "no version"
    return f"The comparison was made with {compared}, and {now} is {CHAMPION} now; evaluate again against it."


def _champion_before(client: "MlflowClient", model_name: str, version: str) -> str | None:
    """The champion before this version; on a retry after the move, the one it replaced."""
    line = [former for former in former_champions(client, model_name) if former != version]
    return line[-1] if line else None


def _check_decision(request: RegistrationRequest, evaluation: Mapping[str, Any], policy: GateConfig) -> None:
    again = decide(evaluation, request.champion, policy)
    if again.verdict != request.decision.verdict:
        raise RegistryError(
            f"the decision handed over is {request.decision.verdict}, and the evidence in {request.evaluation_folder} "
            f"gives {again.verdict} ({' '.join(again.reasons)}); decide on this evaluation and register again"
        )


def _metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The evaluation's figures as MLflow metrics, `heldout/gain` and so on; parts not measured are left out."""
    parts = {part: evaluation["metrics"].get(part) or {} for part in _INTERVALS}
    return {
        f"{part}/{key}": float(parts[part][key])
        for part, keys in _INTERVALS.items()
        for key in keys
        if parts[part].get(key) is not None
    }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RegistryError(f"no {path.name} in {path.parent}; run the stage that writes it before registering")
    return json.loads(path.read_bytes())
