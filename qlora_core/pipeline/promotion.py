"""The end of a job: decide against the champion, write the report, register, move the aliases.

Unlike the stages before, what is decided here depends on the registry's champion of the moment. So the decision's key
holds the champion it was made against, and MLflow itself is asked whether this very candidate was registered before.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.digest import digest_file, digest_json
from qlora_core.pipeline.champion_lease import champion_lease
from qlora_core.pipeline.findings import DRIFT_FILE, SLICES_FILE, drift_since, finding_lines, weak_slices
from qlora_core.pipeline.pipeline import Pipeline, StageResult
from qlora_core.pipeline.stages import evaluate_settings, lineage, paid_verdicts
from qlora_core.registry.champion import Champion
from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.lineage import lineage as lineage_graph
from qlora_core.store.refs import add_ref

if TYPE_CHECKING:
    from qlora_core.registry.register import RegistrationRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gate:
    """The decision as stored: `decision` has "verdict", "reasons", "champion" (version or null) and the comparison.

    `drift` is that of the data since the champion's (None without one), `diagnosis` the worst slices.
    """

    result: StageResult
    decision: dict[str, Any]
    report: Path
    drift: dict[str, Any] | None
    diagnosis: dict[str, Any]


class Promotion:
    """Gate and registration of a pipeline's best adapter."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.job = pipeline.job

    @cached_property
    def run_key(self) -> str:
        """Identity of this candidate and the policy it is held against: one registration each."""
        evaluated = self.pipeline.run("evaluate").artifact
        return digest_json({"evaluation": evaluated.digest, "gate": self.job.section("gate")})

    @cached_property
    def registered(self) -> dict[str, Any] | None:
        """The registration of this very candidate, if there is one."""
        from qlora_core.registry.registration import find_registration

        config = self.job.config
        return find_registration(config.tracking_uri, config.registry.model_name, self.run_key)

    @cached_property
    def champion(self) -> Champion | None:
        """The present champion, its files fetched and verified."""
        from qlora_core.registry.champion import current_champion

        config = self.job.config
        return current_champion(config.tracking_uri, config.registry.model_name, config.work_dir / "champions")

    @cached_property
    def reigns(self) -> bool:
        """Whether this very adapter is champion already: measured anew, or under another policy, it is one version."""
        from qlora_core.registry.adapter_files import adapter_sha256

        adapter = self.pipeline.run("sweep").artifact.path / "adapter"
        return self.champion is not None and self.champion.adapter_sha256 == adapter_sha256(adapter)

    @property
    def settled(self) -> bool:
        """Whether the decision stands; where the champion changed meanwhile, a next run compares again."""
        from qlora_core.registry.registration import find_registration

        config = self.job.config
        found = find_registration(config.tracking_uri, config.registry.model_name, self.run_key)
        return found is not None or self.reigns

    @property
    def rival(self) -> Champion | None:
        """Whom the candidate must beat: the champion, unless it is champion itself; None means the base."""
        return None if self.reigns else self.champion

    def gate(self) -> Gate:
        """The decision and the report, made now or read back."""
        if self.registered is not None:
            against = self.registered["compared_with"]
        else:
            against = self.rival.adapter_sha256 if self.rival else "none"
        inputs = {name: self.pipeline.run(name).artifact for name in ("curate", "quantize", "sweep", "evaluate")}
        digests = {name: artifact.digest for name, artifact in inputs.items()} | {"champion": against}
        key = StageKey("gate", "4", self.job.section("gate"), digests)
        result = self.pipeline.get_or_build("gate", key, lambda out: self._decide(inputs, out))
        decision = json.loads((result.artifact.path / "decision.json").read_text(encoding="utf-8"))
        drift, diagnosis = (
            json.loads((result.artifact.path / file).read_text(encoding="utf-8")) for file in (DRIFT_FILE, SLICES_FILE)
        )
        return Gate(result, decision, result.artifact.path / "report.html", drift, diagnosis)

    def _decide(self, inputs: Mapping[str, Artifact], out: Path) -> None:
        from qlora_core.registry.gate.decide import decide
        from qlora_core.report.report import write_report

        evaluation = _read(inputs["evaluate"], "evaluation.json")
        champion = self.rival
        comparison = self._against(champion, inputs, out) if champion else None
        verdict = decide(evaluation, comparison, self.job.config.gate)
        decision = {
            "verdict": verdict.verdict,
            "reasons": list(verdict.reasons),
            "champion": champion.version if champion else None,
            "compared_with": champion.adapter_sha256 if champion else "none",
            "comparison": comparison,
        }
        graph = lineage_graph([result.artifact.manifest for result in self.pipeline.results()])
        (out / "decision.json").write_text(json.dumps(decision, indent=1, allow_nan=False), encoding="utf-8")
        (out / "lineage.json").write_text(json.dumps(graph, indent=1), encoding="utf-8")
        drift = drift_since(self.job.store, self.job.config.registry.model_name, champion, inputs["curate"])
        diagnosis = weak_slices(self.job.config, evaluation, comparison, inputs)
        for file, found in ((DRIFT_FILE, drift), (SLICES_FILE, diagnosis)):
            text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
            (out / file).write_text(text, encoding="utf-8")
        write_report(
            out / "report.html",
            config=self.job.config.resolved(),
            curation=_read(inputs["curate"], "curation.json"),
            quantization=_read(inputs["quantize"], "quantization.json"),
            quality=_read(inputs["quantize"], "quality/quality.json") if self.job.quality_text else None,
            sweep=_read(inputs["sweep"], "sweep.json"),
            evaluation=evaluation,
            decision=decision,
            lineage=graph,
            curated_folder=inputs["curate"].path,
            evaluation_folder=inputs["evaluate"].path,
            findings=finding_lines(drift, diagnosis),
            diagnosis=diagnosis,
            comparison_folder=out,
        )

    def _against(self, champion: Champion, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        """The candidate beside the champion on the same held-out rows, or why they cannot be compared."""
        quantized = inputs["quantize"]
        if champion.quantized_base_digest != quantized.digest:
            return {
                "version": champion.version,
                "incomparable": f"champion version {champion.version} was trained on another quantized base "
                f"({champion.quantized_base_digest[:12]}) than this one ({quantized.digest[:12]})",
            }
        from qlora_core.evaluation.evaluate import compare_adapters

        settings = evaluate_settings(self.job)
        watched = settings.general_text is not None or settings.latency_prompts > 0
        with paid_verdicts(self.job) as verdicts:
            compared = compare_adapters(
                settings,
                quantized.path,
                reference_folder=champion.folder,
                evaluation_folder=inputs["evaluate"].path,
                curated_folder=inputs["curate"].path,
                precision=self.job.config.train.precision,
                residency=self.job.config.compute.residency_settings,
                adapter_folder=inputs["sweep"].path / "adapter" if watched else None,
                judged=self.job.config.gate.primary.metric == "judge",
                verdict_cache=verdicts,
                out=out,
            )
        return {"version": champion.version, **compared}

    def register(self) -> tuple[dict[str, Any], bool]:
        """The registration, and whether it was there before. Aliases move only after the clean-process check."""
        if self.registered is not None:
            return self._as_answered(self.registered), True
        gate = self.gate()
        if self.champion is not None and self.reigns:
            already = f"This adapter is champion version {self.champion.version} already; nothing was registered."
            reasons = [*gate.decision["reasons"], already]
            found = {"version": self.champion.version, "aliases": ["champion"], "reasons": reasons}
            return {**found, "verdict": gate.decision["verdict"]}, True
        from qlora_core.registry.register import register_run

        logger.info("register: started")
        config = self.job.config
        # Before there is a version: what one refers to must never be collected, and a spare reference does no harm.
        addresses = [result.artifact.manifest.address for result in self.pipeline.results()]
        add_ref(self.job.store.backend, "model", f"{config.registry.model_name}/{self.run_key}", addresses)
        out = config.work_dir / "registrations" / self.run_key[:16]
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with champion_lease(config):
            return register_run(self._request(gate), out), False

    def _as_answered(self, registration: dict[str, Any]) -> dict[str, Any]:
        """A registration that asked for a person's decision, with what was decided since."""
        if not registration.get("approval"):
            return registration
        from qlora_core.registry.approval import approval_of

        config = self.job.config
        _, approval = approval_of(config.tracking_uri, config.registry.model_name, registration["version"])
        reasons = list(registration["reasons"])
        if approval.state != "waiting":
            reasons[-1] = f"{approval.state} by {approval.by or 'nobody'} at {approval.at}: {approval.why or '-'}"
        verdict = "PROMOTE" if approval.state == "approved" else registration["verdict"]
        return {**registration, "verdict": verdict, "reasons": reasons, "approval": approval.state}

    def _request(self, gate: Gate) -> "RegistrationRequest":
        from qlora_core.registry.register import RegistrationRequest

        config = self.job.config
        inputs = {name: self.pipeline.run(name).artifact for name in ("curate", "quantize", "sweep", "evaluate")}
        made_from = {"base_model": config.base.model, "config_digest": self.job.config_digest}
        return RegistrationRequest(
            tracking_uri=config.tracking_uri,
            model_name=config.registry.model_name,
            experiment=config.registry.experiment,
            work_dir=config.work_dir,
            config=config.resolved(),
            sweep_folder=inputs["sweep"].path,
            evaluation_folder=inputs["evaluate"].path,
            quantized_folder=inputs["quantize"].path,
            report=gate.report,
            decision=gate.decision,
            lineage={**lineage(self.job, inputs), **made_from},
            run_key=self.run_key,
            sweep_key=inputs["sweep"].manifest.key,
            keep_evidence=self.keep_evidence,
        )

    def keep_evidence(self, file: Path) -> str:
        """The evidence as an artifact that the version's reference keeps; its address in the store."""
        key = StageKey("evidence", "1", {}, {"evidence": digest_file(file)})

        def build(out: Path) -> None:
            shutil.copyfile(file, out / file.name)

        artifact, _ = self.job.store.get_or_build(key, build)
        name = f"{self.job.config.registry.model_name}/{self.run_key}"
        add_ref(self.job.store.backend, "model", name, [artifact.manifest.address])
        return artifact.manifest.address

    def row(self, *, cached: bool, seconds: float) -> dict[str, Any]:
        """The registration as a stage, the way the command line and Prefect report stages."""
        return {"name": "register", "key": self.run_key, "cached": cached, "seconds": round(seconds, 3)}


def _read(artifact: Artifact, file: str) -> dict[str, Any]:
    return json.loads((artifact.path / file).read_text(encoding="utf-8"))
