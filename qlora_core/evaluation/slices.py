"""A measure by slice of the prompts and by column (a model, a candidate, a judge): values, and what they can tell.

Knows labels and numbers. A cell is underpowered where it has fewer than `least` units, or where its interval holds the
value of no difference and a difference of `margin` would not show in 8 of 10 tries (`power.minimum_detectable_effect`).
It still has its value: it is marked, not hidden.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from qlora_core.evaluation.comparisons import Comparison
from qlora_core.evaluation.statistics.bootstrap import ratio_interval
from qlora_core.evaluation.statistics.power import minimum_detectable_effect

ALL = "all"
UNLABELLED = "no category"
LEAST_PROMPTS = 30
WIN_RATE_MARGIN = 0.15
RESAMPLES = 1000
CONFIDENCE = 0.95
NEUTRAL = {"win_rate": 0.5, "loss_gain": 0.0}
"""Each measure's value where neither side is better."""

MAX_SLICES = 24

Unit = tuple[float, float]
"""A numerator and its weight: (score, 1) for a mean over prompts, (nats gained, tokens) for a loss."""


class Cell(NamedTuple):
    """One slice of one column. `low` and `high` are null for one unit; `detectable` is in the value's unit."""

    value: float
    low: float | None
    high: float | None
    size: int
    detectable: float | None
    underpowered: bool


class SliceTable(NamedTuple):
    """`rows`: each slice's label with a cell per column (None: nothing there); the first row is of all units."""

    measure: Literal["win_rate", "loss_gain"]
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    least: int
    margin: float


def win_rate_slices(
    comparisons: Sequence[Comparison],
    categories: Mapping[str, str | None],
    models: Sequence[str],
    *,
    least: int = LEAST_PROMPTS,
    margin: float = WIN_RATE_MARGIN,
) -> SliceTable:
    """Each model's mean score against all it was compared with (win 1, tie .5), by the prompts' category.

    The unit is the prompt: a model's comparisons on one prompt are averaged first. Prompts without a category are a
    slice of their own.
    """
    scores: dict[str, dict[str, list[float]]] = {model: defaultdict(list) for model in models}
    for one in comparisons:
        if one.score is not None:
            scores[one.first][one.prompt_id].append(one.score)
            scores[one.second][one.prompt_id].append(1 - one.score)
    columns = {
        model: {prompt: (float(np.mean(found)), 1.0) for prompt, found in by_prompt.items()}
        for model, by_prompt in scores.items()
    }
    return slice_table("win_rate", columns, categories, least=least, margin=margin)


def slice_table(
    measure: Literal["win_rate", "loss_gain"],
    columns: Mapping[str, Mapping[str, Unit]],
    labels: Mapping[str, str | None],
    *,
    least: int,
    margin: float,
) -> SliceTable:
    """The table of columns that give each unit's id its (numerator, weight); a cell's value is the ratio of sums.

    Slices are in the order of their names; beyond the `MAX_SLICES` largest they are one, the last. Cells without weight
    are None. Raises EvaluationError for numbers that are not finite.
    """
    ids = {one for units in columns.values() for one in units}
    rows = [
        (
            name,
            [
                _cell([units[one] for one in sorted(members) if one in units], NEUTRAL[measure], least, margin)
                for units in columns.values()
            ],
        )
        for name, members in _named(ids, labels)
    ]
    return SliceTable(measure, list(columns), rows, least, margin)


def _named(ids: set[str], labels: Mapping[str, str | None]) -> list[tuple[str, set[str]]]:
    slices: dict[str, set[str]] = defaultdict(set)
    for one in ids:
        slices[labels.get(one) or UNLABELLED].add(one)
    ranked = sorted(slices, key=lambda name: (-len(slices[name]), name))
    rest = ranked[MAX_SLICES:]
    named = [(ALL, ids)]
    if len(ranked) > 1:
        named += [(name, slices[name]) for name in sorted(ranked[:MAX_SLICES])]
    if rest:
        named.append((f"{len(rest)} smaller ones", {one for name in rest for one in slices[name]}))
    return named


def _cell(units: Sequence[Unit], neutral: float, least: int, margin: float) -> Cell | None:
    numerators, weights = (np.array([unit[part] for unit in units], np.float64) for part in (0, 1))
    if not weights.sum() > 0:
        return None
    value = float(numerators.sum() / weights.sum())
    if len(units) < 2:
        return Cell(value, None, None, len(units), None, True)
    found = ratio_interval(numerators, weights, confidence=CONFIDENCE, resamples=RESAMPLES, seed=0)
    # The ratio's standard error by linearisation: of (numerator - value * weight) / mean weight
    spread = float(np.std((numerators - value * weights) / weights.mean(), ddof=1))
    detectable = minimum_detectable_effect(spread, len(units))
    open_still = found.low <= neutral <= found.high and detectable > margin
    return Cell(value, found.low, found.high, len(units), detectable, len(units) < least or open_still)
