"""Percent of a reference system's score, as in the QLoRA paper's Table 6. Knows score pairs, not who gave them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.bootstrap import ratio_interval
from qlora_core.evaluation.verdict import Verdict


class ScorePair(NamedTuple):
    """One judged comparison on a 10-point scale: the system's score, the reference's, and whose answer came first."""

    prompt_id: str
    system: float
    reference: float
    first: Literal["system", "reference"]


def percent_of_reference(pairs: Sequence[ScorePair], *, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    """100 * sum(system) / sum(reference) over both orders: a ratio of sums, which fits the paper's printed means best.

    Only prompts scored in both orders count, so that the orders' bias cancels; the others are told in `incomplete`. The
    interval resamples prompts. Keys: percent, low, high, system_first and reference_first (the ratio within one order),
    prompts, incomplete. Raises EvaluationError where no prompt has both orders or the reference's scores sum to 0.
    """
    by_prompt: dict[str, list[ScorePair]] = defaultdict(list)
    for pair in pairs:
        by_prompt[pair.prompt_id].append(pair)
    complete = [by_prompt[p] for p in sorted(by_prompt) if {q.first for q in by_prompt[p]} == {"system", "reference"}]
    if not complete:
        raise EvaluationError(
            f"none of {len(by_prompt)} prompts is scored in both orders; judge both orders of each prompt"
        )
    top = [sum(pair.system for pair in group) for group in complete]
    bottom = [sum(pair.reference for pair in group) for group in complete]
    ratio = ratio_interval(top, bottom, confidence=confidence, resamples=resamples, seed=seed)
    kept = [pair for group in complete for pair in group]
    return {
        "percent": 100 * ratio.value,
        "low": 100 * ratio.low,
        "high": 100 * ratio.high,
        "system_first": _percent([pair for pair in kept if pair.first == "system"]),
        "reference_first": _percent([pair for pair in kept if pair.first == "reference"]),
        "prompts": len(complete),
        "incomplete": len(by_prompt) - len(complete),
    }


def score_pairs(verdicts: Sequence[Verdict], system: str) -> list[ScorePair]:
    """The scored rows of one system as score pairs; rows without points (unscored, or of other judges) are left out."""
    pairs = []
    for row in verdicts:
        if row.points is not None and system in (row.model_a, row.model_b):
            is_a = row.model_a == system
            own, other = row.points if is_a else (row.points[1], row.points[0])
            first = "system" if (row.first == "a") == is_a else "reference"
            pairs.append(ScorePair(row.prompt_id, own, other, first))
    return pairs


def _percent(pairs: Sequence[ScorePair]) -> float | None:
    bottom = sum(pair.reference for pair in pairs)
    return 100 * sum(pair.system for pair in pairs) / bottom if bottom > 0 else None
