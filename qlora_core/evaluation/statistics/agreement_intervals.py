"""Bootstrap intervals of agreement coefficients over items. Knows label codes, not raters' names or what labels say.

The coefficients of all resamples are computed at once from per-item counts; the point values come from the libraries in
`agreement`, and the tests hold the two against each other.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.bootstrap import percentile_interval, resample_weights

Level = Literal["nominal", "ordinal", "interval"]
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Item weights [resamples, items] -> values [resamples]."""


def fleiss_kappas(counts: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fleiss' kappa (1971) for each row of item weights [resamples, items]; `counts` [items, labels] of equal sums."""
    raters = counts[0].sum()
    agreeing = (counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))
    total = weights.sum(axis=1)
    observed = weights @ agreeing / total
    shares = weights @ counts / (total * raters)[:, None]
    return _beyond_chance(observed, (shares**2).sum(axis=1))


def cohen_kappas(
    first: NDArray[np.int64], second: NDArray[np.int64], labels: int, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cohen's kappa (1960) for each row of item weights; `first`, `second` [items] are label codes below `labels`."""
    table = np.zeros((len(first), labels, labels))
    table[np.arange(len(first)), first, second] = 1.0
    joint = (weights @ table.reshape(len(first), -1)).reshape(-1, labels, labels) / weights.sum(axis=1)[:, None, None]
    observed = np.trace(joint, axis1=1, axis2=2)
    return _beyond_chance(observed, (joint.sum(axis=2) * joint.sum(axis=1)).sum(axis=1))


def krippendorff_alphas(
    counts: NDArray[np.float64], values: NDArray[np.float64], level: Level, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Krippendorff's alpha (2011) for each row of item weights; `counts` [items, labels], `values` [labels] ascending.

    Items with fewer than two labels pair nothing and weigh nothing. alpha = 1 - observed / expected disagreement, from
    the coincidence matrix o[c, k] = sum over items of pairs (c, k) / (labels - 1).
    """
    size = counts.shape[1]
    given = counts.sum(axis=1)
    paired = given >= 2
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(size)
    pairs = np.where(paired[:, None, None], pairs / np.maximum(given - 1, 1)[:, None, None], 0.0)
    coincidences = (weights @ pairs.reshape(len(counts), -1)).reshape(-1, size, size)
    marginals = coincidences.sum(axis=2)
    total = marginals.sum(axis=1)
    distance = _distances(marginals, values, level)
    observed = (coincidences * distance).sum(axis=(1, 2))
    expected = (marginals[:, :, None] * marginals[:, None, :] * distance).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.0 - (total - 1) * observed / expected


def item_interval(
    items: int, statistic: Statistic, *, confidence: float, resamples: int, seed: int
) -> list[float] | None:
    """[low, high] of a statistic of item weights over resampled items; None where no resample has a value."""
    drawn = [statistic(weights) for weights in resample_weights(items, resamples=resamples, seed=seed)]
    try:
        return list(percentile_interval(np.concatenate(drawn), confidence))
    except EvaluationError:
        return None


def _distances(marginals: NDArray[np.float64], values: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """Squared distances [resamples, labels, labels]; the ordinal ones count the labels that lie between."""
    size = len(values)
    if level == "nominal":
        return np.broadcast_to(1.0 - np.eye(size), (len(marginals), size, size))
    if level == "interval":
        return np.broadcast_to((values[:, None] - values[None, :]) ** 2, (len(marginals), size, size))
    middle = np.cumsum(marginals, axis=1) - marginals / 2
    return (middle[:, :, None] - middle[:, None, :]) ** 2


def _beyond_chance(observed: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (observed - expected) / (1.0 - expected)
