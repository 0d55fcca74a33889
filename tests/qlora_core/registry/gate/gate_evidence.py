"""Evidence made by hand, as an evaluation records it, for the tests of the gate's policy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_core.evaluation.statistics.bootstrap import ratio_interval

CATEGORIES = ("qa", "summary", "code")


def columns(count: int, categories: Sequence[str | None] | None = None) -> dict[str, list[Any]]:
    labels = list(categories) if categories is not None else [CATEGORIES[i % 3] for i in range(count)]
    return {"id": [f"{i:04d}" for i in range(count)], "category": labels, "language": ["en"] * count}


def rows_table(gains: Sequence[float], categories: Sequence[str | None] | None = None) -> dict[str, Any]:
    """Rows of 10 tokens whose losses fall by `gains` nats per token."""
    before = [20.0] * len(gains)
    after = [20.0 - 10 * gain for gain in gains]
    tokens = [10] * len(gains)
    return {**columns(len(gains), categories), "tokens": tokens, "before": before, "after": after}


def answers(count: int, **changes: Any) -> dict[str, list[Any]]:
    plain: dict[str, list[Any]] = {
        "words": [20] * count,
        "refusal": [False] * count,
        "degenerate": [False] * count,
        "format": [None] * count,
        "matches": [None] * count,
    }
    return plain | changes


def prompts_table(
    count: int,
    *,
    before: dict[str, list[Any]] | None = None,
    after: dict[str, list[Any]] | None = None,
    judge: Sequence[float | None] | None = None,
    human: Sequence[float | None] | None = None,
) -> dict[str, Any]:
    return {
        **columns(count),
        "before": before or answers(count),
        "after": after or answers(count),
        "judge": list(judge) if judge is not None else [None] * count,
        "human": list(human) if human is not None else [None] * count,
    }


def heldout_of(rows: dict[str, Any]) -> dict[str, Any]:
    """The recorded comparison of the table's losses."""
    gains = np.array(rows["before"]) - np.array(rows["after"])
    found = ratio_interval(gains, np.array(rows["tokens"], dtype=float), confidence=0.95, resamples=500, seed=0)
    return {
        "rows": len(gains),
        "base_loss": 2.0,
        "adapter_loss": 2.0 - found.value,
        "gain": found.value,
        "gain_low": found.low,
        "gain_high": found.high,
        "confidence": 0.95,
    }


def evaluation(
    gains: Sequence[float],
    *,
    categories: Sequence[str | None] | None = None,
    prompts: dict[str, Any] | None = None,
    judge: dict[str, Any] | None = None,
    human_alpha: float | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """An evaluation with its per-item table; `facts` stand beside the metrics."""
    rows = rows_table(gains, categories)
    items = {"rows": rows, "prompts": prompts or prompts_table(60), "human_alpha": human_alpha}
    metrics = {"heldout": heldout_of(rows), "exact_match": None, "judge": judge}
    return {"metrics": metrics, "items": items, "behaviour": {"general": None, "latency": None}, **facts}


def scattered(mean: float, sd: float, count: int, seed: int = 0) -> list[float]:
    """Draws whose mean is exactly `mean`."""
    drawn = np.random.default_rng(seed).normal(0, sd, count)
    return (drawn - drawn.mean() + mean).tolist()
