"""Few human votes joined with many judge verdicts: prediction-powered inference for a mean.

Angelopoulos et al. 2023, "Prediction-powered inference", with the power tuning of PPI++ (Angelopoulos, Duchi, Zrnic
2023). The judge may be biased: the labelled part corrects it, and a useless judge gets the weight 0. Knows
numbers only.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from qlora_core.errors import EvaluationError


class PredictionPowered(NamedTuple):
    """The mean human score estimated from both sources, with the interval people alone and the judge alone give."""

    value: float
    low: float
    high: float
    weight: float
    """lambda: how much the judge's verdicts are worth, 0 to 1."""
    human_value: float
    human_low: float
    human_high: float
    judge_value: float


def prediction_powered_mean(
    human: ArrayLike,
    judge_labelled: ArrayLike,
    judge_unlabelled: ArrayLike,
    *,
    confidence: float,
    weight: float | None = None,
    sampling_weights: ArrayLike | None = None,
) -> PredictionPowered:
    """theta = mean(human - lambda judge, labelled) + lambda mean(judge, unlabelled), with a normal interval.

    `human` and `judge_labelled` have shape [labelled], `judge_unlabelled` [unlabelled]; one entry per unit (prompt).
    lambda (None: tuned) is Cov(human, judge) / ((1 + n / N) Var(judge)), held to [0, 1]; the variance is
    Var(human - lambda judge) / n + lambda^2 Var(judge) / N. Labelled units must be drawn at random, or bear
    `sampling_weights` (inverse probabilities of being drawn).

    Raises EvaluationError for fewer than two units of either kind, unequal lengths, or values that are not finite.
    """
    y, f, rest = (np.asarray(v, dtype=np.float64) for v in (human, judge_labelled, judge_unlabelled))
    _check(y, f, rest)
    w = _normalised(sampling_weights, len(y))
    ratio = len(y) / len(rest)
    if weight is None:
        spread = float(np.var(np.concatenate([f, rest]), ddof=1))
        covariance = float(np.sum(w * (y - w @ y) * (f - w @ f)) * len(y) / (len(y) - 1))
        weight = min(1.0, max(0.0, covariance / ((1 + ratio) * spread))) if spread > 0 else 0.0
    z = float(norm.ppf(0.5 + confidence / 2))
    value = float(w @ (y - weight * f) + weight * rest.mean())
    error = np.sqrt(_variance_of_mean(y - weight * f, w) + weight**2 * rest.var(ddof=1) / len(rest))
    human_value, human_error = float(w @ y), np.sqrt(_variance_of_mean(y, w))
    return PredictionPowered(
        value=value,
        low=float(value - z * error),
        high=float(value + z * error),
        weight=float(weight),
        human_value=human_value,
        human_low=float(human_value - z * human_error),
        human_high=float(human_value + z * human_error),
        judge_value=float(np.concatenate([f, rest]).mean()),
    )


def _variance_of_mean(values: NDArray[np.float64], w: NDArray[np.float64]) -> float:
    """Of a weighted (Hajek) mean, by linearisation: n / (n - 1) sum (w (v - mean))^2; the plain one for equal w."""
    return float(len(values) / (len(values) - 1) * np.sum((w * (values - w @ values)) ** 2))


def _normalised(weights: ArrayLike | None, count: int) -> NDArray[np.float64]:
    if weights is None:
        return np.full(count, 1 / count)
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (count,) or not np.isfinite(w).all() or (w <= 0).any():
        raise EvaluationError(f"sampling weights need shape ({count},) and values above 0, got shape {w.shape}")
    return w / w.sum()


def _check(y: NDArray[np.float64], f: NDArray[np.float64], rest: NDArray[np.float64]) -> None:
    if y.shape != f.shape or y.ndim != 1 or rest.ndim != 1 or len(y) < 2 or len(rest) < 2:
        raise EvaluationError(
            f"{y.shape} human scores, {f.shape} judge scores beside them and {rest.shape} without: give equally many "
            "of the first two, and at least 2 of each"
        )
    if not all(np.isfinite(v).all() for v in (y, f, rest)):
        raise EvaluationError("a score is not finite; leave unscored verdicts out and count them")
