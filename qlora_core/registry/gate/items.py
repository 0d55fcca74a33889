"""Paired differences of challenger and rival per item, from the evidence's table, and what they say of the mean.

Knows the table (`evaluation.item_table`) and statistics, not what a policy asks for. d > 0: the challenger is better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from qlora_core.evaluation.statistics.bootstrap import ratio_interval
from qlora_core.evaluation.statistics.sequential import confidence_sequence
from qlora_core.registry.gate.findings import UnusableEvidenceError

Metric = Literal["loss", "exact_match", "judge"]

UNLABELLED = "(none)"
POWER = 0.8
RESAMPLES = 2000
LOSS_CUT = 1.0
"""Nats per token: an always-valid interval needs bounded differences, so larger ones of a row are cut to this."""
_REACH: Mapping[Metric, float] = {"loss": LOSS_CUT, "exact_match": 1.0, "judge": 0.5}


class Estimate(NamedTuple):
    """A mean difference with its interval, over how many items, and the true one that is seen in 8 of 10 tries."""

    value: float
    low: float
    high: float
    items: int
    detectable: float | None


@dataclass(frozen=True)
class PairedItems:
    """d_i and weights w_i of the items that a metric compares, shape [items], with each one's slice label.

    The mean is sum(w d) / sum(w): nats per token for the loss (w: trained tokens), a plain mean for the others. `judge`
    differences are the win score less one half.
    """

    metric: Metric
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    d: NDArray[np.float64]
    w: NDArray[np.float64]

    def part(self, labels: Sequence[str]) -> "PairedItems":
        """The items with one of these labels."""
        kept = np.array([label in labels for label in self.labels], dtype=np.bool_)
        ids = tuple(one for one, keep in zip(self.ids, kept, strict=True) if keep)
        named = tuple(one for one, keep in zip(self.labels, kept, strict=True) if keep)
        return PairedItems(self.metric, ids, named, self.d[kept], self.w[kept])


def read_items(items: Mapping[str, Any] | None, metric: Metric, name: str, by: str = "none") -> PairedItems:
    """The items of one metric. Raises UnusableEvidenceError where the table lacks them or a figure is not finite."""
    table = (items or {}).get("rows" if metric == "loss" else "prompts")
    if not isinstance(table, Mapping):
        raise UnusableEvidenceError(f"{name} holds no per-item table of {metric}; evaluate again to record it")
    try:
        rows = _losses(table) if metric == "loss" else _scores(table, metric)
        labels = [UNLABELLED] * len(table["id"]) if by == "none" else [label or UNLABELLED for label in table[by]]
        kept = [(str(i), label, *row) for i, label, row in zip(table["id"], labels, rows, strict=True) if row]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableEvidenceError(f"{name}'s per-item table cannot be read ({error!r}); evaluate again") from error
    d, w = (np.array([row[place] for row in kept], dtype=np.float64) for place in (2, 3))
    if not (np.isfinite(d).all() and np.isfinite(w).all()):
        raise UnusableEvidenceError(f"{name}'s per-item table of {metric} holds a figure that is not finite")
    return PairedItems(metric, tuple(row[0] for row in kept), tuple(row[1] for row in kept), d, w)


def fixed_estimate(items: PairedItems, alpha: float) -> Estimate:
    """Percentile bootstrap over items at 1 - alpha, true for one look at items whose number was fixed before."""
    found = ratio_interval(items.w * items.d, items.w, confidence=1 - alpha, resamples=RESAMPLES, seed=0)
    half = (found.high - found.low) / 2
    return Estimate(found.value, found.low, found.high, len(items.d), detectable(half, normal_error(half, alpha)))


def always_valid_estimate(items: PairedItems, alpha: float) -> Estimate:
    """The interval that stays true however often the growing evidence is read, for the plain mean over items.

    `confidence_sequence` on d scaled to [0, 1], in the table's order: by id, a content hash, in whose choice no score
    has a say, and to which more rows only add at the end. A row's loss difference is cut to +-1 nat per token.
    """
    reach = _REACH[items.metric]
    cut = np.clip(items.d, -reach, reach)
    low, high = confidence_sequence((cut / reach + 1) / 2, confidence=1 - alpha)[-1]
    low, high = (2 * low - 1) * reach, (2 * high - 1) * reach
    value = float(np.clip(cut.mean(), low, high))
    error = float(cut.std(ddof=1)) / math.sqrt(len(cut))
    return Estimate(value, float(low), float(high), len(cut), detectable(float(high - low) / 2, error))


def detectable(half_width: float, error: float) -> float:
    """The true mean difference whose interval lies above zero in 8 of 10 tries: half_width + z(.8) standard errors.

    With the half width z(1 - alpha / 2) standard errors of a fixed-n interval that is 2.8 of them at .05 (Cohen 1988).
    """
    return half_width + float(stats.norm.ppf(POWER)) * error


def normal_error(half_width: float, alpha: float) -> float:
    """The standard error that a normal interval of this half width at 1 - alpha has."""
    return half_width / float(stats.norm.ppf(1 - alpha / 2))


def mean_and_error(items: PairedItems) -> tuple[float, float]:
    """The weighted mean and its standard error, sqrt(n / (n - 1) sum (w (d - mean))^2) / sum(w) (ratio estimator).

    Exact match gets half an item added to each cell of the 2 x 2 table, so that no change seen in few items is not
    taken for certainty (Agresti and Min 2005, simple improved intervals for matched proportions).
    """
    d, w = items.d, items.w
    n = len(d)
    if items.metric == "exact_match":
        mean = float(d.sum() / (n + 2))
        squares = float((d**2).sum() + 1) / (n + 2)
        return mean, math.sqrt(max(squares - mean**2, 0.0) / (n + 2))
    mean = float((w * d).sum() / w.sum())
    return mean, math.sqrt(n / (n - 1) * float(((w * (d - mean)) ** 2).sum())) / float(w.sum())


def _losses(table: Mapping[str, Any]) -> list[tuple[float, float] | None]:
    columns = zip(table["before"], table["after"], table["tokens"], strict=True)
    return [((before - after) / tokens, tokens) if tokens else None for before, after, tokens in columns]


def _scores(table: Mapping[str, Any], metric: Metric) -> list[tuple[float, float] | None]:
    if metric == "judge":
        return [None if score is None else (score - 0.5, 1.0) for score in table["judge"]]
    pairs = zip(table["before"]["matches"], table["after"]["matches"], strict=True)
    return [None if b is None or a is None else (float(a) - float(b), 1.0) for b, a in pairs]
