"""Rank correlation of two scorings of the same systems. Knows numbers only.

Over few systems both coefficients are coarse: read the permutation p-value before the coefficient.
"""

from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from qlora_core.errors import EvaluationError

EXACT_SYSTEMS = 8
RANDOM_PERMUTATIONS = 20_000


class RankCorrelation(NamedTuple):
    """Coefficients in [-1, 1] and two-sided permutation p-values."""

    kendall_tau: float
    kendall_p: float
    spearman: float
    spearman_p: float
    systems: int


def rank_correlation(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> RankCorrelation:
    """Kendall's tau-b and Spearman's rho, ties by their usual corrections (scipy.stats).

    Both have shape [systems]. p: share of permutations with a coefficient at least as far from 0; all permutations up
    to eight systems, else 20,000 seeded ones with the observed order counted in. Raises EvaluationError for fewer than
    two systems, unequal lengths, values that are not finite, and where all values of a side are equal.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise EvaluationError(f"rank correlation needs two scores of two or more systems, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise EvaluationError("rank correlation needs finite scores; leave systems without one out")
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        raise EvaluationError("all scores of one side are equal, so ranks say nothing; give other scores")
    orders = _orders(len(a), seed)
    signs_a, signs_b = (np.sign(side[:, None] - side[None, :]) for side in (a, b))
    concordance = np.array([(signs_a * signs_b[np.ix_(order, order)]).sum() for order in orders])
    ranks_a, ranks_b = stats.rankdata(a) - (len(a) + 1) / 2, stats.rankdata(b) - (len(a) + 1) / 2
    products = np.array([ranks_a @ ranks_b[order] for order in orders])
    tau, rho = (np.asarray(measure(a, b))[0] for measure in (stats.kendalltau, stats.spearmanr))
    return RankCorrelation(
        kendall_tau=float(tau),
        kendall_p=_share_as_far(concordance),
        spearman=float(rho),
        spearman_p=_share_as_far(products),
        systems=len(a),
    )


def _orders(systems: int, seed: int) -> list[np.ndarray]:
    """Permutations, the observed order first."""
    if systems <= EXACT_SYSTEMS:
        return [np.array(order) for order in permutations(range(systems))]
    rng = np.random.default_rng(seed)
    return [np.arange(systems), *(rng.permutation(systems) for _ in range(RANDOM_PERMUTATIONS))]


def _share_as_far(values: np.ndarray) -> float:
    return float(np.mean(np.abs(values) >= abs(values[0]) - 1e-9))
