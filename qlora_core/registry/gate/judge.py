"""The gate's checks of a judge: is it certified as the judge it was, did it score enough, does it agree?

Knows the recorded judge figures and the policy, not how a judge decides.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_core.config.gate import GateConfig
from qlora_core.registry.gate.findings import Finding, UnusableEvidenceError, interval, number
from qlora_core.registry.gate.humans import human_findings, votes_used
from qlora_core.registry.gate.primary import Comparison

_CHECK = "judge"
_IDENTITY = ("fingerprint", "snapshot")


def primary_judge_findings(metrics: Mapping[str, Any], comparison: Comparison, policy: GateConfig) -> Iterator[Finding]:
    """`primary.metric: judge`: whether its verdicts may be believed, and people's votes where they are joined.

    Raises UnusableEvidenceError for no judge, too many unscored verdicts, a certificate of another judge, and verdicts
    against the champion by another judge than those against the base.
    """
    measured = _checked(comparison.measured.get("judge"), policy)
    _same_judge(metrics.get("judge"), measured)
    yield from human_findings(comparison.items, policy)
    if not votes_used(comparison.items, policy):
        yield _certified(measured)


def agreement_finding(metrics: Mapping[str, Any], policy: GateConfig) -> Finding:
    """`judge: require`: a certified judge's win rate over the base must lie above one half.

    Raises UnusableEvidenceError as `primary_judge_findings` does.
    """
    return _agreement(_checked(metrics.get("judge"), policy))


def _checked(judge: Any, policy: GateConfig) -> Mapping[str, Any]:
    if not isinstance(judge, Mapping):
        raise UnusableEvidenceError("the policy requires a judge, and the evaluation has none (evaluate.judge.kind)")
    scored, unscored = (number(judge, key, "metrics.judge") for key in ("scored", "unscored"))
    share = unscored / (scored + unscored) if scored + unscored else 1.0
    if share > policy.max_unscored_share:
        raise UnusableEvidenceError(
            f"the judge left {unscored:.0f} of {scored + unscored:.0f} comparisons unscored ({share:.1%}), "
            f"more than the {policy.max_unscored_share:.1%} the policy allows"
        )
    certificate = judge.get("certificate")
    if judge.get("certified") is True and isinstance(certificate, Mapping):
        for key in _IDENTITY:
            if certificate.get(key) != judge.get(key):
                raise UnusableEvidenceError(
                    f"the judge's {key} is {judge.get(key)!r} and its certificate's {certificate.get(key)!r}; certify "
                    "the judge that was used (`qlora judge certify`)"
                )
    return judge


def _same_judge(against_base: Any, against_rival: Mapping[str, Any]) -> None:
    if not isinstance(against_base, Mapping):
        return
    for key in _IDENTITY:
        if against_base.get(key) != against_rival.get(key):
            raise UnusableEvidenceError(
                f"the champion's verdicts are of a judge with {key} {against_rival.get(key)!r}, the base's of one with "
                f"{against_base.get(key)!r}; evaluate again with one judge"
            )


def _certified(judge: Mapping[str, Any]) -> Finding:
    name = judge.get("model") or judge.get("kind")
    if judge.get("certified") is True:
        return Finding("PROMOTE", f"The judge {name} is certified.", _CHECK)
    return Finding(
        "HOLD",
        f"The judge {name} is not certified, so its win rate decides nothing; certify it (`qlora judge certify`, "
        "evaluate.judge.certificate) or add human votes (evaluate.votes).",
        _CHECK,
    )


def _agreement(judge: Mapping[str, Any]) -> Finding:
    rate, low, high = interval(judge, "metrics.judge", ("win_rate", "low", "high"))
    scored = number(judge, "scored", "metrics.judge")
    figures = f"the judge's win rate is {rate:.3f} (interval {low:.3f} to {high:.3f}, {scored:.0f} scored)"
    if judge.get("certified") is not True:
        name = judge.get("model") or judge.get("kind")
        remedy = "certify it (`qlora judge certify`) or let a person decide"
        return Finding("HOLD", f"The judge {name} is not certified; {figures}; {remedy}.", _CHECK)
    if low > 0.5:
        return Finding("PROMOTE", f"The judge agrees: {figures}, all of it above one half.", _CHECK)
    if high < 0.5:
        return Finding(
            "REJECT", f"The judge disagrees: {figures}, all of it below one half; keep the champion.", _CHECK
        )
    return Finding("HOLD", f"The judge is undecided: {figures}, on both sides of one half; judge more prompts.", _CHECK)
