"""A win rate with the effect of answers' lengths taken out, after AlpacaEval 2 (Dubois et al. 2024).

Knows scores, length differences and places, not texts. Says what the win rate would be were both answers as long; it
does not say that length is no merit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.bootstrap import percentile_interval, resample_weights

MAX_ITERATIONS = 50
TOLERANCE = 1e-10
LARGEST_PARAMETER = 8.0
RIDGE = 0.1


class LengthRow(NamedTuple):
    """One scored comparison: the system's score (1, 0.5, 0), both lengths (any one unit), whether it came first."""

    prompt_id: str
    score: float
    length: float
    other_length: float
    shown_first: bool


def length_controlled_win_rate(
    rows: Sequence[LengthRow], *, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """logit P(win) = theta + phi tanh(length difference / its sd) + gamma place; the win rate at length difference 0.

    place is +1/2 where the system came first, -1/2 where second (left out where all rows have one place), and the rate
    is the mean over both places. A tie is half a win (fractional logistic regression). AlpacaEval's per-instruction
    term is left out: it needs many systems on the same prompts. The interval resamples prompts.

    Keys: win_rate, low, high, raw_win_rate, length_effect (phi; positive: longer answers win), order_effect (gamma or
    null), ridge (true where no finite maximum exists and a penalty of 0.05 times the squared parameters was used),
    prompts. Raises EvaluationError without rows and where a value is not finite.
    """
    if not rows:
        raise EvaluationError("there are no scored comparisons to control for length")
    score = np.array([row.score for row in rows], dtype=np.float64)
    delta = np.array([row.length - row.other_length for row in rows], dtype=np.float64)
    if not (np.isfinite(score).all() and np.isfinite(delta).all()):
        raise EvaluationError("a score or length is not finite; leave unscored comparisons out and count them")
    features = _features(delta, [row.shown_first for row in rows])
    parameters, ridged = _fit(features, score, np.ones((1, len(rows))))
    drawn = _resampled(rows, features, score, resamples=resamples, seed=seed)
    low, high = percentile_interval(drawn, confidence)
    return {
        "win_rate": float(_at_equal_length(parameters)[0]),
        "low": low,
        "high": high,
        "raw_win_rate": float(score.mean()),
        "length_effect": float(parameters[0, 1]),
        "order_effect": float(parameters[0, 2]) if features.shape[1] == 3 else None,
        "ridge": bool(ridged[0]),
        "prompts": len({row.prompt_id for row in rows}),
    }


def _features(delta: NDArray[np.float64], shown_first: Sequence[bool]) -> NDArray[np.float64]:
    """[rows, 2 or 3]: one, the squashed length difference, and the place where both places occur."""
    spread = delta.std()
    length = np.tanh(delta / spread) if spread > 0 else np.zeros_like(delta)
    columns = [np.ones_like(delta), length]
    if len(set(shown_first)) == 2:
        columns.append(np.where(shown_first, 0.5, -0.5))
    return np.stack(columns, axis=1)


def _resampled(
    rows: Sequence[LengthRow],
    features: NDArray[np.float64],
    score: NDArray[np.float64],
    *,
    resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    names = {prompt: i for i, prompt in enumerate(sorted({row.prompt_id for row in rows}))}
    prompt_of = np.array([names[row.prompt_id] for row in rows])
    rates = []
    for weights in resample_weights(len(names), resamples=resamples, seed=seed):
        for start in range(0, len(weights), 64):
            parameters, _ = _fit(features, score, weights[start : start + 64, prompt_of])
            rates.append(_at_equal_length(parameters))
    return np.concatenate(rates)


def _at_equal_length(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    places = parameters[:, 2:3] * 0.5 if parameters.shape[1] == 3 else np.zeros((len(parameters), 1))
    return (expit(parameters[:, 0] + places[:, 0]) + expit(parameters[:, 0] - places[:, 0])) / 2


def _fit(
    features: NDArray[np.float64], score: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Maximum quasi-likelihood for each row of weights [batch, rows]: parameters [batch, size], which took a ridge."""
    parameters, converged = _newton(features, score, weights, 0.0)
    if not converged.all():
        parameters[~converged], _ = _newton(features, score, weights[~converged], RIDGE)
    return parameters, ~converged


def _newton(
    features: NDArray[np.float64], score: NDArray[np.float64], weights: NDArray[np.float64], ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    size = features.shape[1]
    parameters = np.zeros((len(weights), size))
    moving = np.ones(len(weights), dtype=np.bool_)
    for _ in range(MAX_ITERATIONS):
        expected = expit(parameters @ features.T)
        gradient = (weights * (score - expected)) @ features - ridge * parameters
        moving = np.abs(gradient).max(axis=1) > TOLERANCE * np.maximum(1.0, weights.sum(axis=1))
        if not moving.any():
            break
        bent = weights * expected * (1 - expected)
        curvature = np.einsum("br,rp,rq->bpq", bent, features, features, optimize=True)
        curvature += (ridge + 1e-10) * np.eye(size)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        parameters = np.where(moving[:, None], parameters + step, parameters)
    return parameters, ~moving & (np.abs(parameters).max(axis=1) <= LARGEST_PARAMETER)
