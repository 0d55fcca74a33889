"""The registration stage: log the sweep, register its adapter, prove it loads, move the aliases.

Puts the package's parts in order and writes `registration.json`. Running it twice with one `run_key` registers once.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.config.gate import GateConfig
from qlora_core.errors import RegistryError
from qlora_core.registry.aliases import CHALLENGER, former_champions, move_champion, set_alias
from qlora_core.registry.approval import ask
from qlora_core.registry.connection import connect, find_or_create_experiment, registry_lock
from qlora_core.registry.evidence import (
    champion_changed,
    compared_champion,
    evidence_bytes,
    evidence_for,
    write_evidence,
)
from qlora_core.registry.gate.decide import decide
from qlora_core.registry.load_check import LOAD_CHECK_TAG, PASSED, check_version
from qlora_core.registry.parity_certificate import CERTIFICATE_FILE, keep_certificate
from qlora_core.registry.promotion import in_shadow, waits_for_approval
from qlora_core.registry.registration import finish_registration, start_registration
from qlora_core.registry.shadow import begin
from qlora_core.registry.tracking import SweepRecord, log_sweep
from qlora_core.registry.versions import (
    RegisteredVersion,
    register_adapter,
    set_version_tag,
    verify_version,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

REPORT_FILE = "report.html"
EVIDENCE_FILE = "evidence.json"
EVIDENCE_ADDRESS_TAG = "evidence_address"
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
    sweep_key: str | None = None
    """What the sweep was logged under while it trained, see `SweepRecord`."""
    keep_evidence: Callable[[Path], str] | None = None
    """Puts the evidence's file into the artifact store and gives its address there; None: it is with MLflow alone."""


def register_run(request: RegistrationRequest, out: Path) -> dict[str, Any]:
    """Register a job's best adapter; returns what it writes to `out`/registration.json (beside evidence.json and a
    copy of the report).

    Order: runs, version, evidence, load in a clean process, alias `challenger`, and for PROMOTE alias `champion`. A
    failed check raises RegistryError with no alias moved. Under `approve: manual` PROMOTE becomes HOLD: the version is
    `candidate` and waits for a person. A champion that changed since the comparison turns PROMOTE into HOLD, which is
    not recorded as done: the next run compares with the new champion. Keys: model_name, version, run_id, verdict,
    reasons, aliases, champion_before, compared_with, approval ("waiting", or null where nobody is asked), report.
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
    (out / EVIDENCE_FILE).write_bytes(evidence_bytes(evidence))
    if request.keep_evidence is not None:
        set_version_tag(client, version, EVIDENCE_ADDRESS_TAG, request.keep_evidence(out / EVIDENCE_FILE))
    _prove(client, version, request.quantized_folder)
    planned = _planned(client, request, version)
    registration = _move_aliases(client, version, planned, compared_champion(comparison), policy)
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
        sweep_key=request.sweep_key,
        step_logs=request.sweep_folder / "steps",
    )
    experiment_id = find_or_create_experiment(client, request.experiment, request.work_dir)
    adapter = request.sweep_folder / "adapter"
    version = register_adapter(
        client,
        request.model_name,
        adapter,
        run_id=log_sweep(client, experiment_id, record),
        run_key=request.run_key,
        lineage=request.lineage,
    )
    if (adapter / CERTIFICATE_FILE).is_file():
        keep_certificate(client, version, adapter, adapter / CERTIFICATE_FILE)
    return version


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
        "approval": None,
        "report": REPORT_FILE if request.report is not None else None,
    }


def _move_aliases(
    client: "MlflowClient",
    version: RegisteredVersion,
    registration: dict[str, Any],
    expected: str | None,
    policy: GateConfig,
) -> dict[str, Any]:
    better = registration["verdict"] == "PROMOTE"
    if better and policy.shadow.period_s > 0 and expected is not None:
        return _begin_shadow(client, version, registration, policy)
    person = better and policy.approve == "manual"
    if person:
        reasons = [*registration["reasons"], waits_for_approval(version.version)]
        registration = {**registration, "verdict": "HOLD", "reasons": reasons, "approval": "waiting"}
    start_registration(client, version, registration)
    set_alias(client, version.name, CHALLENGER, version.version)
    if person:
        ask(client, version, policy.approve_timeout_s)
    if registration["verdict"] != "PROMOTE":
        return finish_registration(client, version, registration)
    reason = " ".join(registration["reasons"])
    outcome = move_champion(client, version.name, version.version, expected=expected, action="promote", reason=reason)
    if outcome.moved:
        return finish_registration(client, version, registration)
    reasons = [*registration["reasons"], champion_changed(expected, outcome.champion)]
    return {**registration, "verdict": "HOLD", "reasons": reasons, "aliases": [CHALLENGER]}


def _begin_shadow(
    client: "MlflowClient", version: RegisteredVersion, registration: dict[str, Any], policy: GateConfig
) -> dict[str, Any]:
    """HOLD until the candidate has answered beside the champion for its time."""
    start_registration(client, version, registration | {"verdict": "HOLD"})
    set_alias(client, version.name, CHALLENGER, version.version)
    shadow = begin(client, version, policy.shadow.period_s)
    reasons = [*registration["reasons"], in_shadow(version.version, shadow.until)]
    return finish_registration(client, version, registration | {"verdict": "HOLD", "reasons": reasons})


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
