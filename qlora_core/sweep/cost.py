"""What a sweep costs: predicted from its schedule, and what it came to, work that was pruned or failed included.

Knows records and prices; a price is per worker and hour, for a worker has one GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_core.sweep.record import TrialRecord

_SECONDS_PER_HOUR = 3600


def predicted_cost(
    steps: float, tokens: float, seconds_per_token: float | None, price_per_gpu_hour: float | None
) -> dict[str, Any]:
    """Worker-seconds and price of so many trained tokens, as JSON data; None for what is not known."""
    seconds = None if seconds_per_token is None else tokens * seconds_per_token
    return {
        "steps": round(steps),
        "tokens": round(tokens),
        "worker_seconds": None if seconds is None else round(seconds, 1),
        "cost": _price(seconds, price_per_gpu_hour),
    }


def actual_cost(
    records: Sequence[TrialRecord],
    price_per_gpu_hour: float | None,
    *,
    worker_seconds: float | None = None,
    promoted: int = 1,
) -> dict[str, Any]:
    """What was spent, as JSON data. `worker_seconds`: how long workers were held by this process, idle time included.

    `by_state` adds up to the whole; `cost_per_promoted_adapter` charges everything to those that were worth keeping.
    """
    busy = sum(record.seconds for record in records)
    by_state: dict[str, dict[str, Any]] = {}
    for record in records:
        entry = by_state.setdefault(record.state, {"trials": 0, "steps": 0, "tokens": 0, "seconds": 0.0})
        entry["trials"] += 1
        entry["steps"] += record.steps
        entry["tokens"] += record.tokens
        entry["seconds"] = round(entry["seconds"] + record.seconds, 3)
    cost = _price(busy, price_per_gpu_hour)
    return {
        "steps": sum(record.steps for record in records),
        "tokens": sum(record.tokens for record in records),
        "busy_seconds": round(busy, 3),
        "worker_seconds": None if worker_seconds is None else round(worker_seconds, 3),
        "by_state": by_state,
        "price_per_gpu_hour": price_per_gpu_hour,
        "cost": cost,
        "cost_per_promoted_adapter": None if cost is None else round(cost / max(promoted, 1), 6),
    }


def seconds_per_token(records: Sequence[TrialRecord]) -> float | None:
    """Worker-seconds of a trained token so far; None before the first."""
    tokens = sum(record.tokens for record in records)
    return sum(record.seconds for record in records) / tokens if tokens else None


def cost_line(predicted: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """Both side by side, in one sentence."""
    money = "" if actual["cost"] is None else f", cost {actual['cost']:.2f}"
    if predicted.get("cost") is not None:
        money += f" (predicted {predicted['cost']:.2f})"
    spared = sum(entry["steps"] for state, entry in actual["by_state"].items() if state in ("pruned", "failed"))
    return (
        f"{actual['steps']} steps (predicted {predicted['steps']}), {spared} of them in trials that were pruned or "
        f"failed, {actual['busy_seconds']:.0f} worker-seconds{money}"
    )


def _price(seconds: float | None, price_per_gpu_hour: float | None) -> float | None:
    if seconds is None or price_per_gpu_hour is None:
        return None
    return round(seconds / _SECONDS_PER_HOUR * price_per_gpu_hour, 6)
