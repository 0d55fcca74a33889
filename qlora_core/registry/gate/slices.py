"""The gate's regression constraints: no slice of the data may get worse by more than a margin on the primary metric.

Knows the per-item table and the policy's `slices` section. That a slice got worse is claimed after Holm's correction
over the slices; that none did must be shown by every slice, which needs no correction (Berger 1982,
intersection-union).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scipy import stats

from qlora_core.config.gate import GateConfig
from qlora_core.registry.gate.findings import Finding
from qlora_core.registry.gate.items import (
    POWER,
    UNLABELLED,
    PairedItems,
    always_valid_estimate,
    mean_and_error,
    read_items,
)
from qlora_core.registry.gate.primary import Comparison, alpha_of

_CHECK = "slices"


@dataclass(frozen=True)
class SliceResult:
    """One slice: its mean difference, and whether a fall beyond the margin is shown, ruled out, and detectable at all.

    `p_worse` is one-sided, of "the fall is at most the margin"; `detectable` is the fall seen in 8 of 10 tries.
    """

    name: str
    items: int
    value: float
    detectable: float
    powered: bool
    worse: bool
    ruled_out: bool
    p_worse: float


def slice_findings(comparison: Comparison, policy: GateConfig) -> Iterator[Finding]:
    """One finding per slice, in the slices' order; nothing where the policy looks at none."""
    if policy.slices.by == "none":
        return
    for result in measure_slices(comparison, policy):
        yield _finding(result, comparison.rival, policy)


def measure_slices(comparison: Comparison, policy: GateConfig) -> list[SliceResult]:
    """Every slice's figures; under `underpowered: pool` the underpowered ones are one slice, the last.

    Raises UnusableEvidenceError where the evidence has no per-item table or no such label.
    """
    items = read_items(comparison.items, policy.primary.metric, comparison.name, policy.slices.by)
    alpha = alpha_of(comparison, policy)
    parts = {label: items.part([label]) for label in sorted(set(items.labels))}
    if policy.slices.underpowered == "pool":
        parts = _pooled(parts, items, policy, alpha)
    raw = {name: _measure(name, part, policy, alpha, len(parts)) for name, part in parts.items()}
    if policy.primary.test == "always_valid":
        return list(raw.values())
    tested = {name: result.p_worse for name, result in raw.items() if result.items >= policy.slices.min_items}
    shown = holm_rejected(tested, alpha)
    return [_with_worse(result, name in shown) for name, result in raw.items()]


def holm_rejected(p_values: Mapping[str, float], alpha: float) -> set[str]:
    """Which hypotheses Holm's (1979) step-down procedure rejects: p(1) <= alpha / m, p(2) <= alpha / (m - 1), ..."""
    rejected: set[str] = set()
    for place, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        if p_values[name] > alpha / (len(p_values) - place):
            break
        rejected.add(name)
    return rejected


def _pooled(
    parts: Mapping[str, PairedItems], items: PairedItems, policy: GateConfig, alpha: float
) -> dict[str, PairedItems]:
    weak = [name for name, part in parts.items() if not _measure(name, part, policy, alpha, len(parts)).powered]
    if len(weak) < 2:
        return dict(parts)
    joined = {f"{len(weak)} small slices together ({', '.join(weak)})": items.part(weak)}
    return {name: part for name, part in parts.items() if name not in weak} | joined


def _measure(name: str, part: PairedItems, policy: GateConfig, alpha: float, slices: int) -> SliceResult:
    n, margin = len(part.d), policy.slices.margin
    if n < 2:
        return SliceResult(name, n, float(part.d[0]), math.inf, False, False, False, 1.0)
    if policy.primary.test == "always_valid":
        # Bonferroni, the first step of Holm's: each interval is true at every look, and so are all together
        found = always_valid_estimate(part, alpha / slices)
        worse, fine = found.high < -margin, found.low > -margin
        seen = math.inf if found.detectable is None else found.detectable
        powered = n >= policy.slices.min_items and (seen <= margin or worse or fine)
        return SliceResult(name, n, found.value, seen, powered, worse, fine, 1.0)
    mean, error = mean_and_error(part)
    reach = float(stats.t.ppf(1 - alpha, n - 1) + stats.norm.ppf(POWER)) * error
    p_worse, p_fine = _one_sided(mean + margin, error, n)
    powered = n >= policy.slices.min_items and reach <= margin
    return SliceResult(name, n, mean, reach, powered, False, p_fine <= alpha, p_worse)


def _one_sided(distance: float, error: float, n: int) -> tuple[float, float]:
    """p-values of "not below the tolerated" and "not above it" from the distance to it; without scatter 0, 1 or .5."""
    if error == 0:
        below = 0.0 if distance < 0 else 1.0
        return below, 1 - below if distance else 1.0
    t = distance / error
    return float(stats.t.cdf(t, n - 1)), float(stats.t.sf(t, n - 1))


def _with_worse(result: SliceResult, worse: bool) -> SliceResult:
    return SliceResult(**{**vars(result), "worse": worse})


def _finding(result: SliceResult, rival: str, policy: GateConfig) -> Finding:
    margin, by = policy.slices.margin, policy.slices.by
    named = f"{by} {result.name!r}" if result.name != UNLABELLED else f"rows without a {by}"
    figures = (
        f"{named} changes by {result.value:+.4f} against {rival} ({result.items} items, a fall of "
        f"{result.detectable:.4f} is seen in 8 of 10 tries; {margin:g} is tolerated)"
    )
    if result.worse:
        sentence = f"A slice got worse: {figures}; look at its rows in the report before training again."
        return Finding("REJECT", sentence, _CHECK)
    if result.ruled_out and result.items >= policy.slices.min_items:
        return Finding("PROMOTE", f"A slice holds: {figures}.", _CHECK)
    if result.powered:
        return Finding("HOLD", f"A fall in a slice is not ruled out: {figures}; score more of its rows.", _CHECK)
    if policy.slices.underpowered == "waive":
        return Finding("PROMOTE", f"A slice is too small to tell, and waived: {figures}.", _CHECK)
    return Finding(
        "HOLD",
        f"A slice is too small to tell: {figures}; add rows to it, or set gate.slices.underpowered to waive or pool.",
        _CHECK,
    )
