"""The gate's primary check: is the challenger better than its rival, or at least not worse, beyond chance?

Knows one comparison and the policy's `primary` section, not how either came about.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_core.config.gate import GateConfig
from qlora_core.registry.gate.findings import Finding, UnusableEvidenceError, interval, number, section
from qlora_core.registry.gate.humans import joined_estimate
from qlora_core.registry.gate.items import (
    Estimate,
    Metric,
    always_valid_estimate,
    detectable,
    fixed_estimate,
    normal_error,
    read_items,
)

DEFAULT_ALPHA = 0.05
_WHAT: Mapping[Metric, str] = {
    "loss": "held-out loss gain over {} is {:+.4f} nats per token (interval {:+.4f} to {:+.4f}, {} rows)",
    "exact_match": "share of prompts answered exactly, less that of {}, is {:+.4f} (interval {:+.4f} to {:+.4f}, {} "
    "prompts)",
    "judge": "judge's win rate against {}, less one half, is {:+.4f} (interval {:+.4f} to {:+.4f}, {} prompts)",
}
_KEYS: Mapping[Metric, tuple[str, tuple[str, str, str], str]] = {
    "loss": ("heldout", ("gain", "gain_low", "gain_high"), "rows"),
    "exact_match": ("exact_match", ("difference", "low", "high"), "prompts"),
    "judge": ("judge", ("win_rate", "low", "high"), "prompts"),
}
_MORE_DATA = "; score more items (evaluate.max_rows, evaluate.max_prompts), or let a person decide"


@dataclass(frozen=True)
class Comparison:
    """Challenger against one rival: `measured` holds heldout, exact_match and judge, as evaluation.json's metrics do.

    `name` says where the figures stand; `items` is the per-item table (None: not recorded); `behaviour` holds what else
    was measured of both (general, latency).
    """

    name: str
    rival: str
    measured: Mapping[str, Any]
    items: Mapping[str, Any] | None
    behaviour: Mapping[str, Any]


def primary_finding(comparison: Comparison, policy: GateConfig) -> Finding:
    """Better (or not worse) beyond chance: PROMOTE; shown not to be: REJECT; too few items or undecided: HOLD."""
    estimate, note = primary_estimate(comparison, policy)
    metric = policy.primary.metric
    figures = _figures(comparison.rival, metric, estimate) + note
    if estimate.items < policy.min_rows:
        unit = "rows" if metric == "loss" else "prompts"
        asked = f"and the policy asks for at least {policy.min_rows} {unit}"
        return _finding("HOLD", f"Too few {unit}: {figures}, {asked}{_MORE_DATA}.")
    if policy.primary.rule == "non_inferiority":
        found = _not_worse(estimate, figures, policy.primary.margin)
    else:
        found = _better(estimate, figures, required_gain(policy))
    if estimate.detectable is None:
        return found
    seen = f"Evidence like this could detect a true gain of {estimate.detectable:.4f} in 8 of 10 tries."
    return _finding(found.verdict, f"{found.sentence} {seen}")


def primary_estimate(comparison: Comparison, policy: GateConfig) -> tuple[Estimate, str]:
    """The primary metric's difference (judge: less one half), and what is to be said of how it was estimated.

    The recorded interval is taken as it is for one look at the recorded confidence; another test or alpha is computed
    from the per-item table.
    """
    primary = policy.primary
    if primary.metric == "judge":
        joined = joined_estimate(comparison.items, policy, alpha_of(comparison, policy))
        if joined is not None:
            return joined
    if primary.test == "always_valid":
        items = read_items(comparison.items, primary.metric, comparison.name)
        _two_items(len(items.d), comparison.name)
        return always_valid_estimate(items, alpha_of(comparison, policy)), ", valid however often it is read"
    if primary.alpha is not None:
        items = read_items(comparison.items, primary.metric, comparison.name)
        _two_items(len(items.d), comparison.name)
        return fixed_estimate(items, primary.alpha), f", at alpha {primary.alpha:g}"
    return _recorded(comparison, primary.metric, alpha_of(comparison, policy)), ""


def alpha_of(comparison: Comparison, policy: GateConfig) -> float:
    """The policy's two-sided error, else that of the recorded interval, else .05."""
    if policy.primary.alpha is not None:
        return policy.primary.alpha
    recorded = (comparison.measured.get("heldout") or {}).get("confidence")
    return DEFAULT_ALPHA if recorded is None else 1 - number({"confidence": recorded}, "confidence", comparison.name)


def required_gain(policy: GateConfig) -> float:
    """What the interval must lie above under superiority, in the metric's unit."""
    least = policy.primary.min_gain
    return max(least, policy.min_loss_gain) if policy.primary.metric == "loss" else least


def _recorded(comparison: Comparison, metric: Metric, alpha: float) -> Estimate:
    part, keys, count = _KEYS[metric]
    where = f"{comparison.name}.{part}"
    figures = section(comparison.measured, part, comparison.name)
    value, low, high = interval(figures, where, keys)
    shift = 0.5 if metric == "judge" else 0.0
    rows, half = int(number(figures, count, where)), (high - low) / 2
    seen = detectable(half, normal_error(half, alpha))
    return Estimate(value - shift, low - shift, high - shift, rows, seen)


def _better(estimate: Estimate, figures: str, required: float) -> Finding:
    if estimate.low > required:
        return _finding("PROMOTE", f"Better: {figures}, all of it above the required {required:g}.")
    if estimate.high <= 0:
        return _finding(
            "REJECT", f"Not better: {figures}, none of it above zero; keep the champion and look at the data."
        )
    if estimate.high < required:
        short = f"Less than is required: {figures}, all of it below the required {required:g}"
        return _finding("HOLD", f"{short}; more items would hardly change that: look at the data or the requirement.")
    return _finding("HOLD", f"Inconclusive: {figures}, not all of it above the required {required:g}{_MORE_DATA}.")


def _not_worse(estimate: Estimate, figures: str, margin: float) -> Finding:
    if estimate.low > -margin:
        return _finding("PROMOTE", f"Not worse: {figures}, all of it above the tolerated -{margin:g}.")
    if estimate.high < -margin:
        return _finding("REJECT", f"Worse: {figures}, all of it below the tolerated -{margin:g}; keep the champion.")
    return _finding("HOLD", f"Inconclusive: {figures}, not all of it above the tolerated -{margin:g}{_MORE_DATA}.")


def _figures(rival: str, metric: Metric, estimate: Estimate) -> str:
    return "the " + _WHAT[metric].format(rival, *estimate[:4])


def _two_items(count: int, name: str) -> None:
    if count < 2:
        raise UnusableEvidenceError(f"{name}'s per-item table has {count} item(s) of the primary metric; 2 are needed")


def _finding(verdict: Any, sentence: str) -> Finding:
    return Finding(verdict, sentence, "primary")
