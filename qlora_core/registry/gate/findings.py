"""What a check of the gate gives, and how it reads figures: finite numbers or none. Knows no policy and no check."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["PROMOTE", "REJECT", "HOLD", "INVALID"]

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Finding:
    """One check: the verdict it would give alone, the sentence with its figures, and the check's name."""

    verdict: Verdict
    sentence: str
    check: str = "evidence"


class UnusableEvidenceError(Exception):
    """A figure is missing, not a number, or not finite; the text says which."""


def section(parent: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    """The object under `key`. Raises UnusableEvidenceError where there is none."""
    value = parent.get(key)
    if not isinstance(value, Mapping):
        raise UnusableEvidenceError(f"{name} holds no {key}")
    return value


def number(parent: Mapping[str, Any], key: str, name: str) -> float:
    """The finite number under `key`. Raises UnusableEvidenceError for anything else, true and false included."""
    value = parent.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnusableEvidenceError(f"{name}.{key} is {value!r}, not a finite number")
    return float(value)


def interval(parent: Mapping[str, Any], name: str, keys: tuple[str, str, str]) -> tuple[float, float, float]:
    """(point, low, high), ordered; a point outside its own interval is evidence that something else went wrong."""
    point, low, high = (number(parent, key, name) for key in keys)
    if not low - _ROUNDING <= point <= high + _ROUNDING:
        raise UnusableEvidenceError(f"{name}.{keys[0]} {point:g} lies outside its interval {low:g} to {high:g}")
    return point, low, high
