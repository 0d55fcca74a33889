"""Held-out loss of base and adapter on the same rows, with a paired interval. Knows losses, not models."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.bootstrap import ratio_interval


class RowLoss(NamedTuple):
    """One held-out row under one model: the sum of nats over its trained tokens, and how many those are."""

    id: str
    nats: float
    tokens: int


def compare_losses(
    base: Sequence[RowLoss], adapter: Sequence[RowLoss], *, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """Token-weighted mean losses (nats per token) of both, and the gain base - adapter with its paired interval.

    gain = sum_i (base_i - adapter_i) / sum_i tokens_i: a ratio estimator, bootstrapped over rows, since a row's tokens
    are not independent. Positive gain: the adapter is better. A row without trained tokens weighs nothing.
    Keys: rows, tokens, base_loss, adapter_loss, gain, gain_low, gain_high, confidence. Raises EvaluationError where
    the two do not cover the same rows in the same order, where there are fewer than two, or where a loss is not finite.
    """
    if [(row.id, row.tokens) for row in base] != [(row.id, row.tokens) for row in adapter]:
        raise EvaluationError(
            f"paired losses need the same rows in the same order: base has {len(base)}, adapter has {len(adapter)}; "
            "score both on one list of rows"
        )
    if len(base) < 2:
        raise EvaluationError(
            f"{len(base)} held-out row(s): an interval needs at least 2; give more data or a larger test split"
        )
    base_nats = np.array([row.nats for row in base], dtype=np.float64)
    adapter_nats = np.array([row.nats for row in adapter], dtype=np.float64)
    tokens = np.array([row.tokens for row in base], dtype=np.float64)
    for name, nats in (("base", base_nats), ("adapter", adapter_nats)):
        if not np.isfinite(nats).all():
            bad = base[int(np.flatnonzero(~np.isfinite(nats))[0])].id
            raise EvaluationError(f"the {name}'s loss on row {bad!r} is not finite; check the weights and precision")
    gain = ratio_interval(base_nats - adapter_nats, tokens, confidence=confidence, resamples=resamples, seed=seed)
    total = tokens.sum()
    return {
        "rows": len(base),
        "tokens": int(total),
        "base_loss": float(base_nats.sum() / total),
        "adapter_loss": float(adapter_nats.sum() / total),
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "confidence": confidence,
    }
