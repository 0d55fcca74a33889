"""Exact match against references that are short enough to be compared. Knows text and numbers, not models."""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from qlora_core.evaluation.statistics.bootstrap import ratio_interval

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
FINAL_ANSWER = re.compile(r"####\s*\$?\s*([-+]?\d[\d,]*(?:\.\d+)?)")
EDGES = " \t\n\"'`“”‘’«».!?,;:"


def normalised(text: str) -> str:
    """`text` in Unicode NFKC, case-folded, white space collapsed, without quotes and sentence marks at its edges."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(EDGES)


def matches(answer: str, reference: str, max_words: int) -> bool | None:
    """Whether `answer` gives `reference`; None where the reference cannot be compared word for word.

    A reference that ends in a marked final number (`#### N`, as in GSM8K) is compared by that number, whatever its
    length: with the answer's own last marked number, else with its last number, so that a model which was never taught
    the mark is not failed for it. Any other reference of at most `max_words` words is compared after `normalised`;
    two plain numbers are equal when their values are (1,000 and 1000.0). An empty reference is not comparable.
    """
    marked = FINAL_ANSWER.findall(reference)
    if marked:
        found = FINAL_ANSWER.findall(answer) or NUMBER.findall(answer)
        return bool(found) and _value(found[-1]) == _value(marked[-1])
    wanted = normalised(reference)
    if not wanted or len(wanted.split()) > max_words:
        return None
    given = normalised(answer)
    if NUMBER.fullmatch(wanted) and NUMBER.fullmatch(given):
        return _value(given) == _value(wanted)
    return given == wanted


def compare_matches(
    base: Sequence[bool | None], adapter: Sequence[bool | None], *, confidence: float, resamples: int, seed: int
) -> dict[str, Any] | None:
    """Shares of comparable prompts answered exactly, and their difference with a paired interval over prompts.

    Both have one entry per prompt, in the same order, None where the reference is not comparable. Keys: prompts, base,
    adapter, difference (adapter - base), low, high. None where no prompt is comparable.
    """
    pairs = [(b, a) for b, a in zip(base, adapter, strict=True) if b is not None and a is not None]
    if not pairs:
        return None
    hits = np.array(pairs, dtype=np.float64)
    difference = ratio_interval(
        hits[:, 1] - hits[:, 0], np.ones(len(pairs)), confidence=confidence, resamples=resamples, seed=seed
    )
    return {
        "prompts": len(pairs),
        "base": float(hits[:, 0].mean()),
        "adapter": float(hits[:, 1].mean()),
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
    }


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
