"""The account of every row: what was dropped and why, and the funnel that must add up."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.data.reading import SourceReading
from qlora_core.errors import DataError


@dataclass(frozen=True, slots=True)
class Dropped:
    """A usable row left out: by which rule, the id it matched, its length in tokens where that was the reason.

    `score` is what the rule compared with its threshold: a similarity, a coverage, a tag.
    """

    id: str
    source: str
    line: int
    rule: str
    matched_id: str | None = None
    tokens: int | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Funnel:
    """Rows by source and in all, each `{in, kept, dropped, quarantined}`; `reasons` counts dropped rows by rule."""

    rows: Mapping[str, int]
    by_source: Mapping[str, Mapping[str, Any]]
    reasons: Mapping[str, int]
    quarantine_reasons: Mapping[str, int]

    def table(self) -> str:
        """The funnel as lines of text, one per source, then the total and the reasons."""
        header = f"{'source':<40} {'in':>8} {'kept':>8} {'dropped':>8} {'quarantined':>12}"
        lines = [_line(name, counts) for name, counts in [*self.by_source.items(), ("total", self.rows)]]
        why = ", ".join(f"{rule} {n}" for rule, n in self.reasons.items()) or "nothing"
        bad = ", ".join(f"{kind} {n}" for kind, n in self.quarantine_reasons.items()) or "nothing"
        return "\n".join([header, *lines, f"dropped: {why}", f"quarantined: {bad}"])


def make_funnel(readings: Sequence[SourceReading], kept_sources: Sequence[str], dropped: Sequence[Dropped]) -> Funnel:
    """Count every row once. `kept_sources` holds the source of each kept row.

    Raises DataError if what was read is not exactly what was kept, dropped and quarantined, per source.
    """
    kept, gone = Counter(kept_sources), Counter(drop.source for drop in dropped)
    by_source: dict[str, dict[str, Any]] = {}
    for reading in readings:
        counts = {
            "in": reading.rows_in,
            "kept": kept[reading.name],
            "dropped": gone[reading.name],
            "quarantined": len(reading.quarantined),
        }
        if counts["in"] != counts["kept"] + counts["dropped"] + counts["quarantined"]:
            raise DataError(
                f"rows of {reading.name} went missing: {counts}. This is a fault in curation; please report it"
            )
        extra = {"rule": reading.rule, "rule_counts": dict(reading.rule_counts)} if reading.rule else {}
        by_source[reading.name] = {**counts, "format": reading.format, "trimmed": reading.trimmed, **extra}
    totals = {
        part: sum(counts[part] for counts in by_source.values()) for part in ("in", "kept", "dropped", "quarantined")
    }
    bad = Counter(entry.kind for reading in readings for entry in reading.quarantined)
    return Funnel(totals, by_source, _ranked(Counter(drop.rule for drop in dropped)), _ranked(bad))


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _line(name: str, counts: Mapping[str, Any]) -> str:
    return f"{name:<40} {counts['in']:>8} {counts['kept']:>8} {counts['dropped']:>8} {counts['quarantined']:>12}"
