"""Percentile bootstrap of a ratio of sums over independent units. Knows numbers only, not rows, prompts or models."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qlora_core.errors import EvaluationError

WEIGHTS_PER_CHUNK = 4_000_000


class Estimate(NamedTuple):
    """A value with its percentile interval."""

    value: float
    low: float
    high: float


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, *, confidence: float, resamples: int, seed: int
) -> Estimate:
    """sum(numerators) / sum(denominators) with a percentile interval from resampling units with replacement.

    Both have one entry per unit, shape [units]; the same units are drawn for both, so pairing inside a unit is kept.
    Weighted means use the weights as denominators, plain means ones. Float64 throughout, one seed gives one interval.
    Raises EvaluationError without units, on a non-finite entry, and where the denominators sum to zero or less.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if top.size == 0 or top.shape != bottom.shape or top.ndim != 1:
        raise EvaluationError(f"a bootstrap needs paired units, got shapes {top.shape} and {bottom.shape}")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise EvaluationError("a bootstrap needs finite numbers; a loss or score is NaN or infinite")
    if bottom.sum() <= 0:
        raise EvaluationError(f"the units' weights sum to {bottom.sum()}; they must be above 0")
    ratios = []
    for weights in resample_weights(top.size, resamples=resamples, seed=seed):
        # A resample may draw only units without weight: it has no ratio, and the interval leaves it out
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append((weights @ top) / (weights @ bottom))
    low, high = percentile_interval(np.concatenate(ratios), confidence)
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high))


def resample_weights(units: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each unit is drawn in each resample: arrays [<= resamples, units], each row summing to units."""
    rng = np.random.default_rng(seed)
    chunk = max(1, WEIGHTS_PER_CHUNK // units)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        draws = rng.integers(units, size=(count, units)) + np.arange(count)[:, None] * units
        yield np.bincount(draws.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)


def percentile_interval(samples: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """The central `confidence` share of finite samples [resamples]; a ratio that lost all its weight is left out."""
    finite = samples[np.isfinite(samples)]
    if finite.size == 0:
        raise EvaluationError("no resample has a value; there are too few units for an interval")
    tail = (1 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)
