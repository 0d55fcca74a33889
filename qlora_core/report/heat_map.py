"""A slice table as rows of coloured cells for a page. Knows colours and how numbers are written, not what was measured.

Blue is better, orange worse, white neither: two colours that people with any common colour blindness tell apart. The
figure stands in the cell, so colour only repeats it. An underpowered cell is hatched, marked, and half as strong.
"""

from typing import Any, NamedTuple

from qlora_core.evaluation.slices import Cell, SliceTable

MARK = "†"
BETTER, WORSE = (63, 125, 178), (214, 137, 51)
FAINT = 0.5
STRONGEST = 0.75
"""How much of the colour is mixed into white at the ends of the scale: dark text stays readable on it."""


class _Scale(NamedTuple):
    """Where a measure is neither good nor bad, and how far from there its colour is strongest."""

    centre: float
    reach: float


def heat_map(table: SliceTable) -> dict[str, Any]:
    """`columns`, and `rows` of {label, cells}: each null or {text, count, interval, style, underpowered}.

    The scale of a win rate is fixed (0 to 1 around one half); that of a loss gain reaches as far as its largest value.
    """
    values = [abs(cell.value) for _, cells in table.rows for cell in cells if cell is not None]
    scale = _Scale(0.5, 0.5) if table.measure == "win_rate" else _Scale(0.0, max(values, default=0.0) or 1.0)
    return {
        "measure": table.measure,
        "columns": table.columns,
        "least": table.least,
        "margin": _text(table.margin, "win_rate") + " points" if table.measure == "win_rate" else f"{table.margin:g}",
        "underpowered": sum(cell is not None and cell.underpowered for _, cells in table.rows for cell in cells),
        "rows": [
            {
                "label": label,
                "cells": [None if cell is None else _shown(cell, scale, table.measure) for cell in cells],
            }
            for label, cells in table.rows
        ],
    }


def colour(value: float, centre: float, reach: float, *, faint: bool = False) -> tuple[int, int, int]:
    """The background of a value, as red, green and blue of 0 to 255; white at the centre."""
    strength = min(1.0, abs(value - centre) / reach) * STRONGEST * (FAINT if faint else 1.0)
    end = BETTER if value >= centre else WORSE
    red, green, blue = (round(255 + (part - 255) * strength) for part in end)
    return red, green, blue


def _shown(cell: Cell, scale: _Scale, measure: str) -> dict[str, Any]:
    red, green, blue = colour(cell.value, *scale, faint=cell.underpowered)
    low, high = cell.low, cell.high
    interval = None if low is None or high is None else f"{_text(low, measure)} to {_text(high, measure)}"
    return {
        "text": _text(cell.value, measure) + (MARK if cell.underpowered else ""),
        "count": cell.size,
        "interval": interval,
        "detectable": None if cell.detectable is None else _text(cell.detectable, measure).removeprefix("+"),
        "style": f"background-color:#{red:02x}{green:02x}{blue:02x}",
        "underpowered": cell.underpowered,
    }


def _text(value: float, measure: str) -> str:
    if measure == "win_rate":
        return f"{100 * value:.0f}"
    return f"{value:+.3f}".replace("-", "−")
