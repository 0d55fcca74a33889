"""Tests that stay valid however often they are read: stop when the answer is clear, not at a number fixed before.

Knows scores in the order in which they came; that order must not depend on the scores (shuffle the items before). A
fixed-sample 95 % interval read again and again errs several times too often; these do not.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import root_scalar
from scipy.special import betainc, betaln

from qlora_core.errors import EvaluationError

BET_LIMIT = 0.5
GRID = 1001


class SignTest(NamedTuple):
    """After each item, shape [items]: the evidence against "a wins at most half", and 1 / its running maximum."""

    e_values: NDArray[np.float64]
    p_values: NDArray[np.float64]


def sign_test(scores: ArrayLike) -> SignTest:
    """Always-valid one-sided test of P(a wins | decided) <= 1/2, from scores of a (1 won, 0 lost, 0.5 tie).

    e = the likelihood ratio of wins w and losses l against one half, mixed over the uniform prior on (1/2, 1):
    2^(n+1) B(w+1, l+1) (1 - I_{1/2}(w+1, l+1)), n = w + l (beta-binomial mixture; Robbins 1970). By Ville's inequality
    P(some p <= alpha) <= alpha under the null. Ties carry no sign and move nothing. Reject at the first p <= alpha.

    Raises EvaluationError for scores other than 0, 0.5 and 1. No scores give empty arrays.
    """
    x = np.asarray(scores, dtype=np.float64)
    if not np.isin(x, (0.0, 0.5, 1.0)).all():
        raise EvaluationError("a sign test takes scores 0, 0.5 and 1; for others use confidence_sequence")
    wins, losses = np.cumsum(x == 1.0), np.cumsum(x == 0.0)
    log_e = (wins + losses + 1) * np.log(2.0) + betaln(wins + 1, losses + 1)
    with np.errstate(divide="ignore"):  # a mixture without mass above one half is evidence 0
        log_e += np.log(betainc(losses + 1, wins + 1, 0.5))
    e_values = np.exp(log_e)
    return SignTest(e_values, np.minimum(1.0, 1.0 / np.maximum(np.maximum.accumulate(e_values), 1e-300)))


def win_share_sequence(wins: int, losses: int, *, confidence: float) -> tuple[float, float]:
    """An always-valid interval for P(a wins | decided) after `wins` and `losses`, whenever it is read.

    All p with B(w+1, l+1) / (p^w (1-p)^l) < 1 / (1 - confidence): the mixture over the uniform prior on (0, 1). No
    items give (0, 1).
    """
    bound = -np.log(1 - confidence)

    def excess(p: float) -> float:
        log_likelihood = (wins * np.log(p) if wins else 0.0) + (losses * np.log1p(-p) if losses else 0.0)
        return float(betaln(wins + 1, losses + 1) - log_likelihood - bound)

    if wins + losses == 0:
        return 0.0, 1.0
    best, edge = wins / (wins + losses), 1e-12
    inside = min(max(best, edge), 1 - edge)
    low = _root(excess, edge, inside) if wins and excess(edge) > 0 else 0.0
    high = _root(excess, inside, 1 - edge) if losses and excess(1 - edge) > 0 else 1.0
    return low, high


def confidence_sequence(scores: ArrayLike, *, confidence: float) -> NDArray[np.float64]:
    """Always-valid intervals [items, 2] for the mean of scores in [0, 1], also those with ties and near ties.

    Hedged betting (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", theorem 3):
    for each mean m of a grid, two gamblers bet predictable amounts on scores above and below m; m is excluded once half
    of either's capital reaches 1 / (1 - confidence). Intervals only shrink, and are widened by one grid step (0.001).
    For a difference d in [-1, 1] give (d + 1) / 2. Raises EvaluationError for scores outside [0, 1].
    """
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 1 or not ((x >= 0.0) & (x <= 1.0)).all():
        raise EvaluationError("a confidence sequence takes finite scores in [0, 1]; rescale differences to (d + 1) / 2")
    means = np.linspace(0.0, 1.0, GRID)
    kept = np.ones(GRID, dtype=np.bool_)
    log_up, log_down = np.zeros(GRID), np.zeros(GRID)
    limit = np.log(2.0 / (1 - confidence))
    bounds = np.empty((len(x), 2))
    for t, bet in enumerate(_bets(x, 1 - confidence)):
        with np.errstate(divide="ignore"):
            up = np.minimum(bet, np.divide(BET_LIMIT, means))
            down = np.minimum(bet, np.divide(BET_LIMIT, 1 - means))
        log_up += np.log1p(up * (x[t] - means))
        log_down += np.log1p(-down * (x[t] - means))
        still = kept & (np.maximum(log_up, log_down) < limit)
        kept = still if still.any() else kept  # an empty intersection would mean that the scores are not exchangeable
        places = np.flatnonzero(kept)
        step = 1 / (GRID - 1)
        bounds[t] = max(0.0, means[places[0]] - step), min(1.0, means[places[-1]] + step)
    return bounds


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(root_scalar(function, bracket=(low, high), method="brentq", xtol=1e-12).root)


def _bets(x: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """lambda_t = sqrt(2 log(2 / alpha) / (sigma^2_{t-1} t log(1 + t))), from what came before item t only."""
    t = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (t + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (t + 1)
    before = np.concatenate([[0.25], variance[:-1]]) if len(x) else variance
    return np.sqrt(2 * np.log(2 / alpha) / (before * t * np.log1p(t)))
