"""Agreement between raters on the same items. Knows labels as categories, not what they say or who is right.

Labels are compared by their text (1 and "1" are one). A statistic without a value is null with a reason, never NaN.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.jsonl import read_rows
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


Ratings = Mapping[str, Mapping[str, str]]
"""item -> rater -> label"""


def read_labels(path: Path) -> list[Label]:
    """The labels of a JSON Lines file; EvaluationError names each bad line by number."""
    return read_rows(path, Label)


def agreement(labels: Sequence[Label]) -> dict[str, Any]:
    """How far raters agree, raw and beyond chance.

    raw: mean over items with two or more labels of the share of rater pairs that agree. fleiss_kappa: needs equally
    many labels on every item. cohen_kappa: of the two raters; with more, the mean over the pairs in `cohen_pairs`, each
    on the items both labelled. krippendorff_alpha: nominal; copes with missing labels. All are 1 at full agreement and,
    raw aside, 0 at chance. Where one is null, `reasons` says why. items and raters count all that have a label.

    Raises EvaluationError without labels and where a rater labelled an item twice.
    """
    ratings = _by_item(labels)
    rated = {item: given for item, given in ratings.items() if len(given) >= 2}
    raters = sorted({rater for given in ratings.values() for rater in given})
    reasons: dict[str, str] = {}
    pairs = _cohen_pairs(rated, raters)
    values = {
        "fleiss_kappa": _fleiss(ratings, reasons),
        "cohen_kappa": _mean_cohen(pairs, reasons),
        "krippendorff_alpha": _krippendorff(rated, reasons),
        "raw": _raw(rated, reasons),
    }
    return {
        **values,
        "items": len(ratings),
        "raters": len(raters),
        "labels": dict(sorted(Counter(label for given in ratings.values() for label in given.values()).items())),
        "cohen_pairs": pairs,
        "reasons": reasons,
    }


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


def _raw(rated: Ratings, reasons: dict[str, str]) -> float | None:
    if not rated:
        reasons["raw"] = "no item has labels of two raters"
        return None
    shares = []
    for given in rated.values():
        counts = np.array(list(Counter(given.values()).values()))
        total = counts.sum()
        shares.append((counts * (counts - 1)).sum() / (total * (total - 1)))
    return float(np.mean(shares))


def _fleiss(ratings: Ratings, reasons: dict[str, str]) -> float | None:
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
    return float(fleiss_kappa(counts, method="fleiss"))


def _krippendorff(rated: Ratings, reasons: dict[str, str]) -> float | None:
    import krippendorff

    if not rated:
        reasons["krippendorff_alpha"] = "no item has labels of two raters"
        return None
    counts = _counts(rated)
    if counts.shape[1] == 1:
        reasons["krippendorff_alpha"] = "all labels are the same, so no disagreement can be expected"
        return None
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def _cohen_pairs(rated: Ratings, raters: Sequence[str]) -> list[dict[str, Any]]:
    """Cohen's kappa of each pair of raters with a common item; null where both used one and the same label only."""
    from sklearn.metrics import cohen_kappa_score

    pairs = []
    for first, second in combinations(raters, 2):
        common = [(given[first], given[second]) for given in rated.values() if first in given and second in given]
        if not common:
            continue
        used = {label for pair in common for label in pair}
        kappa = None
        if len(used) > 1:
            kappa = float(cohen_kappa_score([a for a, _ in common], [b for _, b in common]))
        pairs.append({"raters": [first, second], "kappa": kappa, "items": len(common)})
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
    values = sorted({label for given in ratings.values() for label in given.values()})
    column = {value: i for i, value in enumerate(values)}
    counts = np.zeros((len(ratings), len(values)), dtype=np.int64)
    for row, given in enumerate(ratings.values()):
        for label in given.values():
            counts[row, column[label]] += 1
    return counts
