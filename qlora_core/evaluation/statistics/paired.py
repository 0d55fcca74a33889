"""Paired differences of two systems over prompts, with intervals that respect repeats. Knows numbers and prompt ids.

The unit is the prompt: orders, judges or samples of one prompt are averaged into one difference first, since counting
them as independent understates the error.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.bootstrap import ratio_interval


def paired_difference(
    differences: ArrayLike, prompts: Sequence[str], *, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """The mean difference over prompts with its error, intervals and p-value.

    `differences`: one value per comparison, shape [comparisons]; `prompts`: the prompt of each. Each prompt weighs the
    same, however many comparisons it has. Keys: difference, sd (of prompt means), standard_error = sd / sqrt(prompts),
    t_low, t_high (Student's t), low, high (percentile bootstrap over prompts), p_value (two-sided t; null where all
    differences are equal), prompts, comparisons.

    Raises EvaluationError for fewer than two prompts, unequal lengths, or a value that is not finite.
    """
    means = prompt_means(differences, prompts)
    if len(means) < 2:
        raise EvaluationError(f"{len(means)} prompt(s): a paired interval needs at least 2; judge more prompts")
    mean, sd = float(means.mean()), float(means.std(ddof=1))
    error = sd / np.sqrt(len(means))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(means) - 1)) * error
    interval = ratio_interval(means, np.ones(len(means)), confidence=confidence, resamples=resamples, seed=seed)
    return {
        "difference": mean,
        "sd": sd,
        "standard_error": float(error),
        "t_low": mean - half,
        "t_high": mean + half,
        "low": interval.low,
        "high": interval.high,
        "p_value": float(2 * stats.t.sf(abs(mean) / error, len(means) - 1)) if error > 0 else None,
        "prompts": len(means),
        "comparisons": len(prompts),
        "confidence": confidence,
    }


def prompt_means(values: ArrayLike, prompts: Sequence[str]) -> NDArray[np.float64]:
    """Mean value of each prompt [prompts], in the order of the prompts' names; no values give an empty array."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (len(prompts),):
        raise EvaluationError(f"{len(prompts)} prompts and values of shape {numbers.shape}; give one value per prompt")
    if not np.isfinite(numbers).all():
        raise EvaluationError("a difference is not finite; leave unscored comparisons out and count them")
    grouped: dict[str, list[float]] = defaultdict(list)
    for prompt, number in zip(prompts, numbers.tolist(), strict=True):
        grouped[prompt].append(number)
    return np.array([np.mean(grouped[prompt]) for prompt in sorted(grouped)], dtype=np.float64)
