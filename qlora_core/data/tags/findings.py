"""A value found in a text that should not be there. Knows no pattern."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """Characters `start` to `end` of a text are of type `kind`, such as EMAIL. The value itself is never kept."""

    start: int
    end: int
    kind: str


def without_overlaps(findings: Iterable[Finding]) -> list[Finding]:
    """In order of place, the earlier in `findings` winning over those that overlap it."""
    chosen: list[Finding] = []
    for finding in findings:
        place = bisect.bisect(chosen, finding.start, key=lambda other: other.start)
        clear_before = place == 0 or chosen[place - 1].end <= finding.start
        clear_after = place == len(chosen) or chosen[place].start >= finding.end
        if clear_before and clear_after:
            chosen.insert(place, finding)
    return chosen


def replaced(text: str, findings: Sequence[Finding]) -> str:
    """`text` with `<KIND>` in the place of every finding; the findings are in order and do not overlap."""
    parts, done = [], 0
    for finding in findings:
        parts += [text[done : finding.start], f"<{finding.kind}>"]
        done = finding.end
    return "".join([*parts, text[done:]])
