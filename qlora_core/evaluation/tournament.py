"""Ratings from pairwise verdicts: Elo as in the QLoRA paper, or Bradley-Terry with ties and an order effect.

Knows verdict rows of any origin, not who judged them or why. A row is a match; rows of one prompt stay together when
prompts are resampled. Ties are half a win in Elo and an outcome of their own in Bradley-Terry; unscored rows are
counted and left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics import bradley_terry
from qlora_core.evaluation.statistics.bootstrap import percentile_interval, resample_weights
from qlora_core.evaluation.statistics.elo import START, Matches, elo_ratings
from qlora_core.evaluation.verdict import Verdict

Method = Literal["elo", "bradley-terry"]
METHODS: tuple[Method, ...] = ("elo", "bradley-terry")
POINTS_PER_LOGIT = 400 / np.log(10)
OUTCOMES_PER_BATCH = 2_000_000
EQUAL_LOGITS = 1e-9


class Cells(NamedTuple):
    """Scored rows as counts [prompts, cells, 3] of (first wins, second wins, tie) per ordered pair of models."""

    models: list[str]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    counts: NDArray[np.float64]


def rate(
    verdicts: Sequence[Verdict],
    method: Method = "bradley-terry",
    *,
    orders: int = 10_000,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Ratings and intervals of all models that appear in scored rows, on a scale whose mean is 1000.

    elo: mean over `orders` random match orders; the interval is over orders. bradley-terry: 1000 + 173.72 x ability;
    the interval is over `resamples` resamples of prompts; beside it standard_errors (sandwich, clustered by prompt),
    rank_intervals and best_share (the share of resamples a model leads). A difference of 400 is odds of ten to one in
    both.

    Keys: ratings and intervals (by model, best first), matches and unscored (rows), order_effect: log odds the first
    shown answer gains, positive where it is favoured, null where each pair has one fixed order. Beside them: method,
    ties, prompts, warnings, and what is the method's own.

    Raises EvaluationError for an unknown method and where no row is scored.
    """
    if method not in METHODS:
        raise EvaluationError(f"rating method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    scored = [row for row in verdicts if row.scored]
    if not scored:
        raise EvaluationError(
            f"none of the {len(verdicts)} verdicts is scored, so there is nothing to rate; "
            "look at their reasons, mend the judge and judge again"
        )
    cells = count_cells(scored)
    design = design_of(cells)
    whole = bradley_terry.fit(design, cells.counts.sum(axis=0, keepdims=True))
    warnings = _warnings(cells, design, whole)
    if method == "elo":
        rated = _by_elo(scored, cells.models, orders=orders, seed=seed, confidence=confidence)
    else:
        rated = _by_bradley_terry(cells, design, whole, resamples=resamples, seed=seed, confidence=confidence)
    return {
        **rated,
        "matches": len(scored),
        "unscored": len(verdicts) - len(scored),
        "order_effect": float(whole.log_order[0]) if design.order else None,
        "method": method,
        "ties": sum(row.verdict == "tie" for row in scored),
        "prompts": len(cells.counts),
        "warnings": warnings,
    }


def count_cells(scored: Sequence[Verdict]) -> Cells:
    """Outcomes of scored rows, prompt by prompt and ordered pair by ordered pair; models sorted by name."""
    models = sorted({name for row in scored for name in (row.model_a, row.model_b)})
    # Prompts are numbered by name, not by place in the file: row order then changes no interval
    prompts = {prompt: i for i, prompt in enumerate(sorted({row.prompt_id for row in scored}))}
    pairs = sorted({_shown(row) for row in scored})
    cell_of = {pair: i for i, pair in enumerate(pairs)}
    counts = np.zeros((len(prompts), len(pairs), 3))
    for row in scored:
        outcome = 2 if row.verdict == "tie" else int(row.verdict != row.first)
        counts[prompts[row.prompt_id], cell_of[_shown(row)], outcome] += 1
    index = {name: i for i, name in enumerate(models)}
    first = np.array([index[name] for name, _ in pairs])
    second = np.array([index[name] for _, name in pairs])
    return Cells(models, first, second, counts)


def _shown(row: Verdict) -> tuple[str, str]:
    return (row.model_a, row.model_b) if row.first == "a" else (row.model_b, row.model_a)


def design_of(cells: Cells) -> bradley_terry.Design:
    """The model these outcomes can bear: an order effect where it is identified, ties where there are any."""
    order = bradley_terry.order_effect_is_identified(cells.first, cells.second, len(cells.models))
    ties = bool(cells.counts[:, :, 2].any())
    return bradley_terry.make_design(cells.first, cells.second, len(cells.models), order=order, ties=ties)


def _by_elo(
    scored: Sequence[Verdict], models: list[str], *, orders: int, seed: int, confidence: float
) -> dict[str, Any]:
    index = {name: i for i, name in enumerate(models)}
    # One order of rows for one set of rows, so that a shuffled file plays the same seeded orders
    rows = sorted(
        scored, key=lambda row: (row.prompt_id, row.model_a, row.model_b, row.first, row.verdict or "", row.judge)
    )
    matches = Matches(
        np.array([index[row.model_a] for row in rows]),
        np.array([index[row.model_b] for row in rows]),
        np.array([row.score_a for row in rows]),
    )
    result = elo_ratings(matches, len(models), orders=orders, seed=seed, confidence=confidence)
    return {
        **_ranked(models, result.mean, list(zip(result.low, result.high, strict=True))),
        "interval": "over random match orders",
        "orders": orders,
        "standard_errors": {name: float(result.standard_error[i]) for i, name in enumerate(models)},
    }


def _by_bradley_terry(
    cells: Cells,
    design: bradley_terry.Design,
    whole: bradley_terry.Fit,
    *,
    resamples: int,
    seed: int,
    confidence: float,
) -> dict[str, Any]:
    prompts = len(cells.counts)
    flat = cells.counts.reshape(prompts, -1)
    batch = max(1, OUTCOMES_PER_BATCH // (flat.shape[1] * design.features.shape[2]))
    abilities, ridged = [], 0
    for weights in resample_weights(prompts, resamples=resamples, seed=seed):
        drawn = (weights @ flat).reshape(len(weights), -1, 3)
        for start in range(0, len(drawn), batch):
            fitted = bradley_terry.fit(design, drawn[start : start + batch])
            abilities.append(fitted.abilities)
            ridged += int(fitted.ridged.sum())
    drawn_abilities = np.concatenate(abilities)
    points = START + POINTS_PER_LOGIT * drawn_abilities
    intervals = [percentile_interval(points[:, i], confidence) for i in range(len(cells.models))]
    # Equal models share a rank: rounding must not name a leader
    ranks = 1 + (drawn_abilities[:, None, :] > drawn_abilities[:, :, None] + EQUAL_LOGITS).sum(axis=2)
    rank_bounds = [percentile_interval(ranks[:, i].astype(np.float64), confidence) for i in range(len(cells.models))]
    return {
        **_ranked(cells.models, START + POINTS_PER_LOGIT * whole.abilities[0], intervals),
        "interval": "over resampled prompts",
        "resamples": resamples,
        "standard_errors": _sandwich_errors(cells, design, whole),
        "rank_intervals": {name: [int(low), int(np.ceil(high))] for name, (low, high) in _named(cells, rank_bounds)},
        "best_share": {name: float(share) for name, share in _named(cells, (ranks == 1).mean(axis=0))},
        "tie_effect": float(np.exp(whole.log_tie[0])) if design.ties else None,
        "ridge": bool(whole.ridged[0]),
        "ridged_resamples": ridged,
    }


def _sandwich_errors(cells: Cells, design: bradley_terry.Design, whole: bradley_terry.Fit) -> dict[str, float] | None:
    """Of the ratings, in points, clustered by prompt; None for a single prompt."""
    if len(cells.counts) < 2:
        return None
    variances = np.diag(bradley_terry.covariance(design, cells.counts, whole).sandwich)
    errors = np.sqrt(np.maximum(variances, 0.0))  # rounding can leave a variance of zero below it
    return {name: float(POINTS_PER_LOGIT * error) for name, error in _named(cells, errors[: len(cells.models)])}


def _named(cells: Cells, values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return zip(cells.models, values, strict=True)


def _ranked(
    models: list[str], ratings: NDArray[np.float64], intervals: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    best_first = sorted(range(len(models)), key=lambda i: (-ratings[i], models[i]))
    return {
        "ratings": {models[i]: float(ratings[i]) for i in best_first},
        "intervals": {models[i]: [float(bound) for bound in intervals[i]] for i in best_first},
    }


def _warnings(cells: Cells, design: bradley_terry.Design, whole: bradley_terry.Fit) -> list[str]:
    warnings = []
    if not bradley_terry.strongly_connected(design, cells.counts.sum(axis=0)):
        warnings.append(
            "the win graph is not strongly connected (some model never lost, never won, or was never compared with the "
            "rest): its Bradley-Terry ratings are finite only through a ridge"
        )
    elif whole.ridged[0]:
        warnings.append(
            "the likelihood has no finite maximum (order and ratings decide every match): Bradley-Terry used a ridge"
        )
    if not design.order:
        warnings.append("every pair was shown in one order only: the order effect cannot be told from the ratings")
    if len(cells.counts) < 2:
        warnings.append("all matches are of one prompt: resampling prompts gives an interval without width")
    return warnings
