"""The promotion gate: evidence and a policy in, a verdict with its reasons out.

Pure arithmetic on figures already measured: it knows nothing of MLflow, models, or how the figures came about, so that
any decision can be made again later from the recorded evidence.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from qlora_core.config.gate import GateConfig

Verdict = Literal["PROMOTE", "REJECT", "HOLD", "INVALID"]

_SEVERITY: tuple[Verdict, ...] = ("INVALID", "REJECT", "HOLD", "PROMOTE")
_ROUNDING = 1e-9
_POWER = 0.8


@dataclass(frozen=True)
class Decision:
    """What the gate says and why: one sentence with the figures per check made, in the order of the checks."""

    verdict: Verdict
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One check: the verdict it would give alone, and the sentence with its figures."""

    verdict: Verdict
    sentence: str


class _UnusableEvidenceError(Exception):
    """A figure is missing, not a number, or not finite; the text says which."""


def decide(evaluation: Mapping[str, Any], champion: Mapping[str, Any] | None, policy: GateConfig) -> Decision:
    """Whether the challenger replaces the champion.

    `evaluation` is the challenger's evaluation (`metrics.heldout`, `metrics.exact_match`, `metrics.judge`), all against
    the base; losses and gains are nats per token, positive gain meaning a lower loss, shares are in [0, 1].
    `champion` holds the same two comparisons against the champion on the same rows (`heldout`, `exact_match`,
    `version`), or `{"incomparable": reason}`; None means there is no champion, and the base is what must be beaten.

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
    except _UnusableEvidenceError as error:
        return [Finding("INVALID", f"The evidence cannot be used: {error}.")]


def detectable_gain(heldout: Mapping[str, Any]) -> float:
    """The true gain (nats per token) that as many rows show in 8 of 10 tries, at the scatter and confidence recorded.

    (z(1 - (1 - confidence) / 2) + z(.8)) times the standard error, which the interval's width gives (Cohen 1988, two
    sided, power .8; 2.8 standard errors at .95). Raises ValueError where the figures hold no such interval.
    """
    try:
        _, low, high = _interval(heldout, "heldout", ("gain", "gain_low", "gain_high"))
        confidence = _number(heldout, "confidence", "heldout")
    except _UnusableEvidenceError as error:
        raise ValueError(str(error)) from error
    z = NormalDist().inv_cdf(1 - (1 - confidence) / 2)
    return (high - low) / (2 * z) * (z + NormalDist().inv_cdf(_POWER))


def _findings(
    evaluation: Mapping[str, Any], champion: Mapping[str, Any] | None, policy: GateConfig
) -> Iterator[Finding]:
    metrics = _section(evaluation, "metrics", "the evaluation")
    heldout = _section(metrics, "heldout", "metrics")
    for key in ("base_loss", "adapter_loss"):
        _number(heldout, key, "metrics.heldout")
    if champion is None:
        yield _loss_finding(heldout, "metrics.heldout", "the base", policy)
        yield from _match_findings(metrics.get("exact_match"), "metrics.exact_match", "the base", policy)
    else:
        yield from _champion_findings(champion, policy)
        yield _base_guard(heldout)
    if policy.judge == "require":
        yield _judge_finding(metrics.get("judge"), policy)


def _champion_findings(champion: Mapping[str, Any], policy: GateConfig) -> Iterator[Finding]:
    if "incomparable" in champion:
        yield Finding(
            "HOLD", f"The challenger is not comparable with the champion: {champion['incomparable']}; a person decides."
        )
        return
    rival = f"champion version {champion.get('version', '(unknown)')}"
    yield _loss_finding(_section(champion, "heldout", "the champion's comparison"), "champion.heldout", rival, policy)
    yield from _match_findings(champion.get("exact_match"), "champion.exact_match", rival, policy)


def _loss_finding(heldout: Mapping[str, Any], name: str, rival: str, policy: GateConfig) -> Finding:
    gain, low, high = _interval(heldout, name, ("gain", "gain_low", "gain_high"))
    rows = _number(heldout, "rows", name)
    figures = (
        f"the held-out loss gain over {rival} is {gain:+.4f} nats per token (interval {low:+.4f} to {high:+.4f}, "
        f"{rows:.0f} rows)"
    )
    if rows < policy.min_rows:
        return Finding("HOLD", f"Too few rows: {figures}, and the policy asks for at least {policy.min_rows} rows.")
    if low > policy.min_loss_gain:
        return Finding("PROMOTE", f"Better: {figures}, all of it above the required {policy.min_loss_gain:g}.")
    if high <= 0:
        return Finding("REJECT", f"Not better: {figures}, none of it above zero.")
    return Finding("HOLD", f"Inconclusive: {figures}, not all of it above the required {policy.min_loss_gain:g}.")


def _match_findings(match: Any, name: str, rival: str, policy: GateConfig) -> Iterator[Finding]:
    if match is None:
        return
    if not isinstance(match, Mapping):
        raise _UnusableEvidenceError(f"{name} is {match!r}, not an object")
    difference, low, high = _interval(match, name, ("difference", "low", "high"))
    tolerance = policy.max_exact_match_loss
    figures = f"exact match against {rival} changes by {difference:+.3f} (interval {low:+.3f} to {high:+.3f})"
    if high < -tolerance:
        yield Finding("REJECT", f"Exact match fell: {figures}, all of it beyond the tolerated -{tolerance:g}.")
    elif low < -tolerance:
        yield Finding("HOLD", f"A fall in exact match is not ruled out: {figures}; -{tolerance:g} is tolerated.")
    else:
        yield Finding("PROMOTE", f"Exact match holds: {figures}, within the tolerated -{tolerance:g}.")


def _base_guard(heldout: Mapping[str, Any]) -> Finding:
    gain, low, high = _interval(heldout, "metrics.heldout", ("gain", "gain_low", "gain_high"))
    figures = f"the gain over the bare base is {gain:+.4f} nats per token (interval {low:+.4f} to {high:+.4f})"
    if high <= 0:
        return Finding("REJECT", f"Worse than no adapter at all: {figures}.")
    if low < 0:
        return Finding("HOLD", f"Not shown to be as good as no adapter at all: {figures}.")
    return Finding("PROMOTE", f"Not worse than the base: {figures}.")


def _judge_finding(judge: Any, policy: GateConfig) -> Finding:
    if not isinstance(judge, Mapping):
        raise _UnusableEvidenceError("the policy requires a judge, and the evaluation has none (evaluate.judge.kind)")
    scored, unscored = (_number(judge, key, "metrics.judge") for key in ("scored", "unscored"))
    share = unscored / (scored + unscored) if scored + unscored else 1.0
    if share > policy.max_unscored_share:
        raise _UnusableEvidenceError(
            f"the judge left {unscored:.0f} of {scored + unscored:.0f} comparisons unscored ({share:.1%}), "
            f"more than the {policy.max_unscored_share:.1%} the policy allows"
        )
    rate, low, high = _interval(judge, "metrics.judge", ("win_rate", "low", "high"))
    figures = f"the judge's win rate is {rate:.3f} (interval {low:.3f} to {high:.3f}, {scored:.0f} scored)"
    if judge.get("certified") is not True:
        return Finding("HOLD", f"The judge {judge.get('model') or judge.get('kind')} is not certified; {figures}.")
    if low > 0.5:
        return Finding("PROMOTE", f"The judge agrees: {figures}, all of it above one half.")
    if high < 0.5:
        return Finding("REJECT", f"The judge disagrees: {figures}, all of it below one half.")
    return Finding("HOLD", f"The judge is undecided: {figures}, on both sides of one half.")


def _section(parent: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    value = parent.get(key)
    if not isinstance(value, Mapping):
        raise _UnusableEvidenceError(f"{name} holds no {key}")
    return value


def _number(section: Mapping[str, Any], key: str, name: str) -> float:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _UnusableEvidenceError(f"{name}.{key} is {value!r}, not a finite number")
    return float(value)


def _interval(section: Mapping[str, Any], name: str, keys: tuple[str, str, str]) -> tuple[float, float, float]:
    """(point, low, high), ordered; a point outside its own interval is evidence that something else went wrong."""
    point, low, high = (_number(section, key, name) for key in keys)
    if not low - _ROUNDING <= point <= high + _ROUNDING:
        raise _UnusableEvidenceError(f"{name}.{keys[0]} {point:g} lies outside its interval {low:g} to {high:g}")
    return point, low, high
