"""Agreement between raters on the same items. Knows labels as categories, not what they say or who is right.

Labels are compared by their text (1 and "1" are one). A statistic without a value is null with a reason, never NaN.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.jsonl import read_rows
from qlora_core.evaluation.statistics.agreement_intervals import (
    Level,
    Statistic,
    cohen_kappas,
    fleiss_kappas,
    item_interval,
    krippendorff_alphas,
)
from qlora_core.evaluation.verdict import Identifier


def _label_as_text(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


class Label(BaseModel):
    """One rater's label of one item. A null label is missing; other fields of the row are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    item_id: Identifier
    rater_id: Identifier
    label: Annotated[Annotated[str, Field(min_length=1)] | None, BeforeValidator(_label_as_text)]


TITLES = {
    "raw": "raw agreement",
    "cohen_kappa": "Cohen's kappa",
    "fleiss_kappa": "Fleiss' kappa",
    "krippendorff_alpha": "Krippendorff's alpha",
}

Ratings = Mapping[str, Mapping[str, str]]
"""item -> rater -> label"""


def read_labels(path: Path) -> list[Label]:
    """The labels of a JSON Lines file; EvaluationError names each bad line by number."""
    return read_rows(path, Label)


def agreement(
    labels: Sequence[Label], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """How far raters agree, raw and beyond chance, with bootstrap intervals over items.

    raw: mean over items with two or more labels of the share of rater pairs that agree. fleiss_kappa: needs equally
    many labels on every item. cohen_kappa: of the two raters; with more, the mean over the pairs in `cohen_pairs`, each
    on the items both labelled. krippendorff_alpha: nominal; copes with missing labels; krippendorff_ordinal and
    krippendorff_interval, there where every label is a number, weigh how far labels lie apart. All are 1 at full
    agreement and, raw aside, 0 at chance. Where one is null, `reasons` says why. `intervals` has [low, high] of each
    that is not null (of cohen_kappa, each pair has its own). items and raters count all that have a label.

    Raises EvaluationError without labels and where a rater labelled an item twice.
    """
    ratings = _by_item(labels)
    rated = {item: given for item, given in ratings.items() if len(given) >= 2}
    raters = sorted({rater for given in ratings.values() for rater in given})
    draw = _Draw(confidence, resamples, seed)
    reasons: dict[str, str] = {}
    intervals: dict[str, list[float] | None] = {}
    pairs = _cohen_pairs(rated, raters, draw)
    values = {
        "fleiss_kappa": _fleiss(ratings, reasons, intervals, draw),
        "cohen_kappa": _mean_cohen(pairs, reasons),
        "krippendorff_alpha": _krippendorff(rated, "nominal", reasons, intervals, draw),
        "raw": _raw(rated, reasons, intervals, draw),
    }
    if all(_number(label) is not None for label in _distinct(ratings)):
        values["krippendorff_ordinal"] = _krippendorff(rated, "ordinal", reasons, intervals, draw)
        values["krippendorff_interval"] = _krippendorff(rated, "interval", reasons, intervals, draw)
    if len(pairs) == 1:
        intervals["cohen_kappa"] = pairs[0]["interval"]
    return {
        **values,
        "intervals": intervals,
        "items": len(ratings),
        "raters": len(raters),
        "labels": dict(sorted(Counter(label for given in ratings.values() for label in given.values()).items())),
        "cohen_pairs": pairs,
        "reasons": reasons,
    }


class _Draw(NamedTuple):
    confidence: float
    resamples: int
    seed: int

    def interval(self, items: int, statistic: Statistic) -> list[float] | None:
        return item_interval(items, statistic, confidence=self.confidence, resamples=self.resamples, seed=self.seed)


def agreement_table(measured: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What `agreement` measured as rows for people: name, value, interval, reason; none where nothing was measured."""
    if measured is None:
        return []
    return [
        {
            "name": title,
            "value": measured[name],
            "interval": measured["intervals"].get(name),
            "reason": measured["reasons"].get(name),
        }
        for name, title in TITLES.items()
    ]


def _by_item(labels: Sequence[Label]) -> Ratings:
    ratings: dict[str, dict[str, str]] = defaultdict(dict)
    for row in labels:
        if row.label is None:
            continue
        if row.rater_id in ratings[row.item_id]:
            raise EvaluationError(
                f"rater {row.rater_id!r} labelled item {row.item_id!r} twice; keep one label per rater and item"
            )
        ratings[row.item_id][row.rater_id] = row.label
    if not ratings:
        raise EvaluationError('there are no labels; give rows like {"item_id": "1", "rater_id": "ann", "label": "a"}')
    return ratings


def _raw(rated: Ratings, reasons: dict[str, str], intervals: dict[str, Any], draw: _Draw) -> float | None:
    if not rated:
        reasons["raw"] = "no item has labels of two raters"
        return None
    counts = _counts(rated)
    total = counts.sum(axis=1)
    shares = (counts * (counts - 1)).sum(axis=1) / (total * (total - 1))
    intervals["raw"] = draw.interval(len(shares), lambda weights: weights @ shares / weights.sum(axis=1))
    return float(shares.mean())


def _fleiss(ratings: Ratings, reasons: dict[str, str], intervals: dict[str, Any], draw: _Draw) -> float | None:
    from statsmodels.stats.inter_rater import fleiss_kappa

    sizes = sorted({len(given) for given in ratings.values()})
    counts = _counts(ratings)
    if sizes != [sizes[0]] or sizes[0] < 2:
        between = f"{sizes[0]} to {sizes[-1]} labels" if len(sizes) > 1 else "one label"
        reasons["fleiss_kappa"] = f"items have {between}; it needs equally many, two or more: use krippendorff_alpha"
        return None
    if counts.shape[1] == 1:
        reasons["fleiss_kappa"] = "all labels are the same, so chance agreement is complete"
        return None
    intervals["fleiss_kappa"] = draw.interval(len(counts), lambda weights: fleiss_kappas(counts.astype(float), weights))
    return float(fleiss_kappa(counts, method="fleiss"))


def _krippendorff(
    rated: Ratings, level: Level, reasons: dict[str, str], intervals: dict[str, Any], draw: _Draw
) -> float | None:
    import krippendorff

    name = "krippendorff_alpha" if level == "nominal" else f"krippendorff_{level}"
    if not rated:
        reasons[name] = "no item has labels of two raters"
        return None
    counts, values = _counts(rated), np.arange(_counts(rated).shape[1], dtype=np.float64)
    if level != "nominal":
        numbers = np.array([float(label) for label in _distinct(rated)])
        order = np.argsort(numbers)
        counts, values = counts[:, order], numbers[order]
    if counts.shape[1] == 1:
        reasons[name] = "all labels are the same, so no disagreement can be expected"
        return None
    weighed = counts.astype(np.float64)
    intervals[name] = draw.interval(len(counts), lambda weights: krippendorff_alphas(weighed, values, level, weights))
    return float(krippendorff.alpha(value_counts=counts, value_domain=values, level_of_measurement=level))


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _cohen_pairs(rated: Ratings, raters: Sequence[str], draw: _Draw) -> list[dict[str, Any]]:
    """Cohen's kappa of each pair of raters with a common item; null where both used one and the same label only."""
    from sklearn.metrics import cohen_kappa_score

    pairs = []
    for first, second in combinations(raters, 2):
        common = [(given[first], given[second]) for given in rated.values() if first in given and second in given]
        if not common:
            continue
        used = sorted({label for pair in common for label in pair})
        kappa = interval = None
        if len(used) > 1:
            kappa = float(cohen_kappa_score([a for a, _ in common], [b for _, b in common]))
            codes = np.array([[used.index(a), used.index(b)] for a, b in common])
            interval = draw.interval(len(common), partial(cohen_kappas, codes[:, 0], codes[:, 1], len(used)))
        pairs.append({"raters": [first, second], "kappa": kappa, "interval": interval, "items": len(common)})
    return pairs


def _mean_cohen(pairs: Sequence[Mapping[str, Any]], reasons: dict[str, str]) -> float | None:
    kappas = [pair["kappa"] for pair in pairs if pair["kappa"] is not None]
    if not pairs:
        reasons["cohen_kappa"] = "no two raters labelled a common item"
    elif len(kappas) < len(pairs):
        reasons["cohen_kappa"] = "a pair of raters used one label only on its common items"
    return float(np.mean(kappas)) if kappas and len(kappas) == len(pairs) else None


def _counts(ratings: Ratings) -> np.ndarray:
    """Labels given per item: int [items, distinct labels]."""
    values = _distinct(ratings)
    column = {value: i for i, value in enumerate(values)}
    counts = np.zeros((len(ratings), len(values)), dtype=np.int64)
    for row, given in enumerate(ratings.values()):
        for label in given.values():
            counts[row, column[label]] += 1
    return counts


def _distinct(ratings: Ratings) -> list[str]:
    return sorted({label for given in ratings.values() for label in given.values()})
