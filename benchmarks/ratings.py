"""Ratings of 40,000 verdicts: 10,000 Elo orders, and 1,000 bootstrap resamples of Bradley-Terry with ties and order.

Eight systems, 715 prompts, both orders of every pair. The bounds are 10 s each on two cores.
"""

import time
from typing import Any

import numpy as np

from qlora_core.evaluation.tournament import METHODS, rate
from qlora_core.evaluation.verdict import Verdict

SYSTEMS = 8
PROMPTS = 715
LIMIT_S = 10.0


def measure(prompts: int = PROMPTS, orders: int = 10_000, resamples: int = 1000) -> dict[str, Any]:
    """Seconds of `rate` by each method, after one warm-up that compiles."""
    verdicts = _verdicts(prompts)
    figures: dict[str, Any] = {"matches": len(verdicts), "orders": orders, "resamples": resamples, "limit_s": LIMIT_S}
    rate(verdicts[:100], "elo", orders=8)
    for method in METHODS:
        started_s = time.perf_counter()
        rate(verdicts, method, orders=orders, resamples=resamples)
        figures[f"{method}_s"] = time.perf_counter() - started_s
    return figures


def _verdicts(prompts: int) -> list[Verdict]:
    rng = np.random.default_rng(0)
    drawn = iter(rng.choice(["a", "b", "tie"], prompts * SYSTEMS * (SYSTEMS - 1), p=[0.5, 0.3, 0.2]).tolist())
    return [
        Verdict.model_validate(
            {
                "prompt_id": f"p{prompt}", "model_a": f"m{i}", "model_b": f"m{j}",
                "verdict": next(drawn), "first": first, "judge": "simulated",
            }
        )
        for prompt in range(prompts)
        for i in range(SYSTEMS)
        for j in range(i)
        for first in ("a", "b")
    ]  # fmt: skip
