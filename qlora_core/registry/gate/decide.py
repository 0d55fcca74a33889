"""The decision: all checks of the gate on one candidate's evidence, and the severest of their verdicts.

Pure arithmetic on figures already measured: it knows nothing of MLflow, models, or how the figures came about, so that
any decision can be made again later from the recorded evidence. The checks are in the modules beside this one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_core.config.gate import GateConfig
from qlora_core.registry.gate.findings import Finding, UnusableEvidenceError, Verdict, interval, number, section
from qlora_core.registry.gate.guards import guard_findings
from qlora_core.registry.gate.judge import agreement_finding, primary_judge_findings
from qlora_core.registry.gate.primary import Comparison, primary_estimate, primary_finding
from qlora_core.registry.gate.slices import slice_findings

_SEVERITY: tuple[Verdict, ...] = ("INVALID", "REJECT", "HOLD", "PROMOTE")


@dataclass(frozen=True)
class Decision:
    """What the gate says and why: one sentence with the figures per check made, in the order of the checks."""

    verdict: Verdict
    reasons: tuple[str, ...]


def decide(evaluation: Mapping[str, Any], champion: Mapping[str, Any] | None, policy: GateConfig) -> Decision:
    """Whether the challenger replaces the champion.

    `evaluation` is the challenger's evaluation (`metrics.heldout`, `metrics.exact_match`, `metrics.judge`, and where
    recorded `items`, `behaviour`, `adapter_bytes`, `parity`), all against the base; losses and gains are nats per
    token, positive gain meaning a lower loss, shares are in [0, 1]. `champion` holds the same comparisons against the
    champion on the same rows (`heldout`, `exact_match`, `items`, `behaviour`, `version`), or `{"incomparable":
    reason}`; None means there is no champion, and the base is what must be beaten.

    The gravest finding decides: INVALID (evidence unusable), REJECT (shown worse, or a guard broken), HOLD
    (inconclusive, too few rows, or not comparable), PROMOTE (every check passed). Never raises on bad evidence: that is
    INVALID.
    """
    findings = check(evaluation, champion, policy)
    found: set[Verdict] = {finding.verdict for finding in findings}
    verdict: Verdict = min(found, key=_SEVERITY.index)
    return Decision(verdict, tuple(finding.sentence for finding in findings))


def check(evaluation: Mapping[str, Any], champion: Mapping[str, Any] | None, policy: GateConfig) -> list[Finding]:
    """Every check that `decide` makes, in order, each with the verdict it gives; unusable evidence gives INVALID."""
    try:
        return list(_findings(evaluation, champion, policy))
    except UnusableEvidenceError as error:
        return [Finding("INVALID", f"The evidence cannot be used: {error}.")]


def compare(evaluation: Mapping[str, Any], champion: Mapping[str, Any] | None) -> Comparison:
    """What the challenger is held against: the champion where there is one, else the base.

    Raises UnusableEvidenceError where the evidence holds no such comparison.
    """
    if champion is None:
        metrics = section(evaluation, "metrics", "the evaluation")
        return Comparison("metrics", "the base", metrics, evaluation.get("items"), evaluation.get("behaviour") or {})
    rival = f"champion version {champion.get('version', '(unknown)')}"
    return Comparison("champion", rival, champion, champion.get("items"), champion.get("behaviour") or {})


def minimum_detectable_gain(
    evaluation: Mapping[str, Any], champion: Mapping[str, Any] | None, policy: GateConfig
) -> float | None:
    """The true gain in the primary metric that evidence of this size and scatter shows in 8 of 10 tries.

    In the metric's unit; None where the evidence holds no usable comparison.
    """
    try:
        if champion is not None and "incomparable" in champion:
            return None
        return primary_estimate(compare(evaluation, champion), policy)[0].detectable
    except UnusableEvidenceError:
        return None


def _findings(
    evaluation: Mapping[str, Any], champion: Mapping[str, Any] | None, policy: GateConfig
) -> Iterator[Finding]:
    metrics = section(evaluation, "metrics", "the evaluation")
    heldout = section(metrics, "heldout", "metrics")
    for key in ("base_loss", "adapter_loss"):
        number(heldout, key, "metrics.heldout")
    comparison = compare(evaluation, champion)
    incomparable = champion is not None and "incomparable" in champion
    if champion is not None and incomparable:
        reason = f"The challenger is not comparable with the champion: {champion['incomparable']}; a person decides."
        yield Finding("HOLD", reason, "champion")
    else:
        yield primary_finding(comparison, policy)
        if policy.primary.metric != "exact_match":
            yield from _match_findings(comparison, policy)
        yield from slice_findings(comparison, policy)
        yield from guard_findings(evaluation, comparison, policy)
    if champion is not None:
        yield _base_guard(heldout)
    if policy.primary.metric == "judge" and not incomparable:
        yield from primary_judge_findings(metrics, comparison, policy)
    if policy.judge == "require":
        yield agreement_finding(metrics, policy)


def _match_findings(comparison: Comparison, policy: GateConfig) -> Iterator[Finding]:
    match, name = comparison.measured.get("exact_match"), f"{comparison.name}.exact_match"
    if match is None:
        return
    if not isinstance(match, Mapping):
        raise UnusableEvidenceError(f"{name} is {match!r}, not an object")
    difference, low, high = interval(match, name, ("difference", "low", "high"))
    tolerance = policy.max_exact_match_loss
    figures = (
        f"exact match against {comparison.rival} changes by {difference:+.3f} (interval {low:+.3f} to {high:+.3f})"
    )
    if high < -tolerance:
        sentence = f"Exact match fell: {figures}, all of it beyond the tolerated -{tolerance:g}; keep the champion."
        yield Finding("REJECT", sentence, "exact_match")
    elif low < -tolerance:
        remedy = "answer more prompts (evaluate.max_prompts)"
        sentence = f"A fall in exact match is not ruled out: {figures}; -{tolerance:g} is tolerated; {remedy}."
        yield Finding("HOLD", sentence, "exact_match")
    else:
        yield Finding("PROMOTE", f"Exact match holds: {figures}, within the tolerated -{tolerance:g}.", "exact_match")


def _base_guard(heldout: Mapping[str, Any]) -> Finding:
    gain, low, high = interval(heldout, "metrics.heldout", ("gain", "gain_low", "gain_high"))
    figures = f"the gain over the bare base is {gain:+.4f} nats per token (interval {low:+.4f} to {high:+.4f})"
    if high <= 0:
        return Finding("REJECT", f"Worse than no adapter at all: {figures}; keep the champion.", "base")
    if low < 0:
        return Finding("HOLD", f"Not shown to be as good as no adapter at all: {figures}; score more rows.", "base")
    return Finding("PROMOTE", f"Not worse than the base: {figures}.", "base")
