"""How today's curated data differ from another time's as distributions: what the champion learned from, against now.

Shares are compared by the population stability index (Siddiqi 2006, "Credit Risk Scorecards", chapter 8):

    PSI = sum over bins of (q - p) ln(q / p),    p and q the shares before and after.

It grows by chance alone where sets are small, so its usual thresholds (0.1, 0.25) are read beside a test: with no drift
PSI / (1/n + 1/m) is nearly chi-square with bins - 1 degrees of freedom (Yurdakul and Naranjo 2020, "Statistical
properties of the population stability index"). Single rows are the business of `diff`; models of none.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from qlora_core.data.diff import diff_curated
from qlora_core.data.split import SIDES
from qlora_core.data.split_columns import iter_columns, read_columns, split_schema

SMALL, LARGE = 0.1, 0.25
SIGNIFICANCE = 0.01
LENGTH_BINS = 10
SHOWN = 12
MISSING = "(none)"
_LABELS = {"sources": "source", "categories": "category", "languages": "language"}
Level = Literal["stable", "shifted", "drifted"]


@dataclass(frozen=True, slots=True)
class Shift:
    """One distribution before and after. `expected` is the index that chance alone gives on average."""

    psi: float
    expected: float
    p_value: float
    bins: int

    @property
    def level(self) -> Level:
        """drifted: PSI above 0.25; shifted: above 0.1; both only where chance is no explanation (p < 0.01)."""
        if self.p_value >= SIGNIFICANCE or self.psi < SMALL:
            return "stable"
        return "drifted" if self.psi >= LARGE else "shifted"

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON data."""
        figures = {"psi": self.psi, "expected_psi": self.expected, "p_value": self.p_value, "bins": self.bins}
        return {"level": self.level, **figures}


def stability(before: Sequence[int], after: Sequence[int]) -> Shift:
    """The population stability index of two lists of counts over the same bins.

    Half a row is added to each bin, so that an empty one has a finite index. Bins that are empty in both are left out.
    Fewer than two bins, or an empty list, cannot drift: zero, p-value 1. Raises ValueError for lists of unequal length.
    """
    counts = np.array([before, after], np.float64)
    counts = counts[:, counts.sum(axis=0) > 0]
    bins = counts.shape[1]
    rows = counts.sum(axis=1)
    if bins < 2 or not rows.all():
        return Shift(0.0, 0.0, 1.0, bins)
    shares = (counts + 0.5) / (rows + 0.5 * bins)[:, None]
    index = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    scale = float((1 / rows).sum())
    return Shift(index, scale * (bins - 1), _chance_of(index / scale, bins - 1), bins)


def drift_report(before: Path, after: Path, *, same_tokenizer: bool) -> dict[str, Any]:
    """Compare the curated folder `after` with `before`, as JSON data.

    Keys: `level` (the gravest), `rows` and `tokens` {before, after}; `sources`, `categories`, `languages` and
    `lengths`, each {level, psi, expected_psi, p_value, bins, shares: [{name, before, after}]} (null where neither
    set has the column); `vocabulary` {divergence_bits, new_share} (null for other tokenizers); and `rows_changed`
    {added, removed, changed_answers}. Shares are of rows in all splits. Raises DataError for a folder that is no
    curated set.
    """
    figures = {name: _labels(before, after, column) for name, column in _LABELS.items()}
    lengths = [_column(folder, "tokens") for folder in (before, after)]
    figures["lengths"] = None if lengths[0] is None or lengths[1] is None else _lengths(lengths[0], lengths[1])
    levels = [figure["level"] for figure in figures.values() if figure is not None]
    diff = diff_curated(before, after)
    return {
        "level": max(levels, key=("stable", "shifted", "drifted").index, default="stable"),
        "rows": {"before": diff.rows.before, "after": diff.rows.after},
        "tokens": None if None in lengths else {"before": _sum(lengths[0]), "after": _sum(lengths[1])},
        **figures,
        "vocabulary": _vocabulary(before, after) if same_tokenizer else None,
        "rows_changed": {
            "added": diff.added.rows,
            "removed": diff.removed.rows,
            "changed_answers": diff.changed_answers.rows,
        },
    }


def drift_lines(report: Mapping[str, Any]) -> list[str]:
    """The report in sentences, the distributions that moved first."""
    rows, changed = report["rows"], report["rows_changed"]
    lines = [
        f"data {report['level']}: {rows['before']} -> {rows['after']} rows; {changed['added']} added, "
        f"{changed['removed']} removed, {changed['changed_answers']} with another answer"
    ]
    for name in (*_LABELS, "lengths"):
        figure = report[name]
        if figure is not None:
            moved = ", ".join(
                f"{one['name']} {one['before']:.1%} -> {one['after']:.1%}" for one in figure["shares"][:3]
            )
            index = f"PSI {figure['psi']:.3f} ({figure['expected_psi']:.3f} by chance, p {figure['p_value']:.2g})"
            lines.append(f"{name} {figure['level']}: {index}; {moved}")
    if report["vocabulary"] is not None:
        words = report["vocabulary"]
        lines.append(
            f"vocabulary: {words['divergence_bits']:.4f} bits apart, {words['new_share']:.2%} of the tokens were never "
            "seen before"
        )
    return lines


def _chance_of(statistic: float, freedom: int) -> float:
    from scipy.stats import chi2  # most of a second, and only here

    return float(chi2.sf(statistic, freedom))


def _labels(before: Path, after: Path, column: str) -> dict[str, Any] | None:
    old, new = _column(before, column), _column(after, column)
    if old is None or new is None:
        return None
    counts = [Counter(MISSING if value is None else str(value) for value in one.to_pylist()) for one in (old, new)]
    names = sorted({*counts[0], *counts[1]})
    return _figure(names, [counts[0][name] for name in names], [counts[1][name] for name in names])


def _lengths(before: pa.ChunkedArray, after: pa.ChunkedArray) -> dict[str, Any]:
    """Over the tenths of the earlier set, so that each bin holds as much of it as its ties allow."""
    old, new = (np.asarray(one.to_numpy(), np.int64) for one in (before, after))
    if not len(old):
        return _figure([], [], [])
    edges = np.unique(np.quantile(old, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1], method="inverted_cdf"))
    names = [
        f"{low}-{high}" for low, high in zip(["0", *(edges + 1).astype(str)], [*edges.astype(str), "more"], strict=True)
    ]
    counts = [np.bincount(np.searchsorted(edges, one, "left"), minlength=len(names)).tolist() for one in (old, new)]
    return _figure(names, counts[0], counts[1])


def _figure(names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    total = max(sum(before), 1), max(sum(after), 1)
    shares = [
        {"name": name, "before": old / total[0], "after": new / total[1]}
        for name, old, new in zip(names, before, after, strict=True)
    ]
    shares.sort(key=lambda one: (-abs(one["after"] - one["before"]), one["name"]))
    return {**stability(before, after).to_json(), "shares": shares[:SHOWN]}


def _vocabulary(before: Path, after: Path) -> dict[str, Any] | None:
    """Jensen-Shannon divergence of the token distributions, base 2 (Lin 1991), and the share of tokens new since."""
    old, new = _token_counts(before), _token_counts(after)
    if not old.sum() or not new.sum():
        return None
    size = max(len(old), len(new))
    old, new = np.pad(old, (0, size - len(old))), np.pad(new, (0, size - len(new)))
    p, q = old / old.sum(), new / new.sum()
    middle = (p + q) / 2
    bits = [float((one[one > 0] * np.log2(one[one > 0] / middle[one > 0])).sum()) for one in (p, q)]
    return {"divergence_bits": max(0.0, sum(bits) / 2), "new_share": float(new[old == 0].sum() / new.sum())}


def _token_counts(folder: Path) -> np.ndarray:
    """Occurrences of every token id in all splits, int64 (largest id + 1,)."""
    counts = np.zeros(0, np.int64)
    for side in SIDES:
        if "input_ids" not in split_schema(folder, side).names:
            continue
        for batch in iter_columns(folder, side, ["input_ids"]):
            found = np.bincount(batch.column(0).flatten().to_numpy(), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
    return counts


def _column(folder: Path, name: str) -> pa.ChunkedArray | None:
    """A column of all splits; None for a set without it."""
    if any(name not in split_schema(folder, side).names for side in SIDES):
        return None
    return pa.concat_tables([read_columns(folder, side, [name]) for side in SIDES]).column(name)


def _sum(column: pa.ChunkedArray | None) -> int:
    return 0 if column is None else int(column.to_numpy().sum())
