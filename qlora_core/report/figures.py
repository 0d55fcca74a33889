"""The report's figures as SVG texts. Knows plain numbers, nothing of where they come from or of HTML.

Equal numbers give equal bytes: no dates, and ids salted with a constant. Nothing touches matplotlib's global state.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.typing import RcKeyType

BASE_COLOUR = "#8b929c"
ADAPTER_COLOUR = "#1f6f8b"
ALARM_COLOUR = "#b3452c"
TRIAL_COLOURS = ("#1f6f8b", "#d08a2e", "#6b5ca5", "#3f8f5b", "#b3452c", "#4a7bd0", "#a0527f", "#7a7f35")
STYLE: dict[RcKeyType, Any] = {
    "svg.hashsalt": "qlora-fleet",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#c6cbd1",
    "axes.labelcolor": "#3d444d",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#5b636d",
    "ytick.color": "#3d444d",
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
}
WIDTH_IN = 6.4
CURVE_POINTS = 200
MAX_PANELS = 3
MAX_BARS = 12


def funnel_figure(stages: Sequence[tuple[str, int]]) -> str:
    """Rows left after each stage of curation, as bars from the top; `stages`: (label, rows) in order, at least one."""
    with rc_context(STYLE):
        figure, axes = new_figure(0.36 * len(stages) + 0.3)
        places = range(len(stages), 0, -1)
        rows = [count for _, count in stages]
        axes.barh(places, rows, height=0.62, color=[*["#cfd6dd"] * (len(stages) - 1), ADAPTER_COLOUR])
        for place, count in zip(places, rows, strict=True):
            axes.text(count + max(max(rows), 1) * 0.01, place, f"{count:,}", va="center", color="#3d444d")
        axes.set_yticks(list(places), [label for label, _ in stages])
        axes.set_xlim(0, max(max(rows), 1) * 1.12)
        _bare(axes)
        return svg_text(figure)


def counts_figure(counts: Mapping[str, int]) -> str | None:
    """Rows by name as bars, the most on top; beyond MAX_BARS names the rest is one bar. None without any."""
    if not counts:
        return None
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ranked[:MAX_BARS], ranked[MAX_BARS:]
    if rest:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    with rc_context(STYLE):
        figure, axes = new_figure(0.28 * len(shown) + 0.3)
        places = range(len(shown), 0, -1)
        axes.barh(places, [count for _, count in shown], height=0.62, color=ADAPTER_COLOUR)
        most = max(max(count for _, count in shown), 1)
        for place, (_, count) in zip(places, shown, strict=True):
            axes.text(count + most * 0.01, place, f"{count:,}", va="center", color="#3d444d")
        axes.set_yticks(list(places), [plain(name) for name, _ in shown])
        axes.set_xlim(0, most * 1.12)
        _bare(axes)
        return svg_text(figure)


def lengths_figure(histogram: Sequence[Mapping[str, int]], window: int) -> str | None:
    """Rows by length in tokens, and the window they had to fit; bins {from, to, rows} as the card has them."""
    if not histogram:
        return None
    with rc_context(STYLE):
        figure, axes = new_figure(2.2)
        widths = [part["to"] - part["from"] + 1 for part in histogram]
        rows = [part["rows"] for part in histogram]
        axes.bar([part["from"] for part in histogram], rows, width=widths, align="edge", color=ADAPTER_COLOUR, lw=0)
        axes.axvline(window, color=ALARM_COLOUR, lw=1.2)
        axes.set_xlabel(f"tokens of a row (window: {window:,})")
        axes.set_ylabel("rows")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        return svg_text(figure)


def matches_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Exact match by category: base and adapter shares with their intervals; rows as `match_table` gives them."""
    with rc_context(STYLE):
        figure, axes = new_figure(0.42 * len(rows) + 0.9)
        places = list(range(len(rows), 0, -1))
        for model, colour, shift in (("base", BASE_COLOUR, 0.13), ("adapter", ADAPTER_COLOUR, -0.13)):
            shares = [row[model]["share"] for row in rows]
            errors = [
                [max(0.0, row[model]["share"] - row[model]["low"]) for row in rows],
                [max(0.0, row[model]["high"] - row[model]["share"]) for row in rows],
            ]
            heights = [place + shift for place in places]
            axes.errorbar(shares, heights, xerr=errors, fmt="o", markersize=5, color=colour, lw=1.6, label=model)
        axes.set_yticks(places, [f"{row['category']} ({row['prompts']})" for row in rows])
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(0.4, len(rows) + 0.6)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.grid(axis="x")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
        return svg_text(figure)


def sweep_figure(trials: Sequence[Mapping[str, Any]], varied: Sequence[str], best: str | None) -> str | None:
    """Validation loss against each varied setting (three at most), one dot a trial; the best is filled.

    None where no trial has a loss or nothing was varied.
    """
    scored = [trial for trial in trials if trial.get("loss") is not None]
    names = list(varied)[:MAX_PANELS]
    if not scored or not names:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 2.5), layout="constrained")
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            _sweep_panel(axes, name, scored, best)
        panels[0].set_ylabel("validation loss (nats)")
        return svg_text(figure)


def curves_figure(trials: Sequence[Mapping[str, Any]]) -> str | None:
    """Training loss by step (running mean) with each trial's validation losses as dots; None without any curve."""
    drawn = [trial for trial in trials if trial.get("curve") or trial.get("rungs")]
    if not drawn:
        return None
    with rc_context(STYLE):
        figure, axes = new_figure(3.0)
        for place, trial in enumerate(drawn):
            colour = TRIAL_COLOURS[place % len(TRIAL_COLOURS)]
            steps, losses = smoothed([(p["step"], p["loss"]) for p in trial.get("curve") or [] if _positive(p["loss"])])
            axes.plot(steps, losses, color=colour, lw=1.4, label=trial["id"])
            rungs = [(rung["step"], rung["loss"]) for rung in trial.get("rungs") or [] if _positive(rung["loss"])]
            axes.scatter(*zip(*rungs, strict=True), color=colour, s=22, zorder=3) if rungs else None
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token), log scale")
        axes.grid(axis="y")
        axes.legend(ncols=min(len(drawn), 6), loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8)
        return svg_text(figure)


def quantization_figure(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """Relative L2 error, one row of dots per kind of layer (the last part of its name); None without layers."""
    if not layers:
        return None
    kinds: dict[str, list[float]] = {}
    for layer in layers:
        kinds.setdefault(layer["name"].rsplit(".", 1)[-1], []).append(layer["relative_l2"])
    with rc_context(STYLE):
        figure, axes = new_figure(0.32 * len(kinds) + 0.7)
        for place, errors in enumerate(reversed(kinds.values()), start=1):
            axes.scatter(errors, [place] * len(errors), s=34, color=ADAPTER_COLOUR, alpha=0.55, edgecolors="none")
        axes.set_yticks(range(1, len(kinds) + 1), list(reversed(kinds)))
        axes.set_ylim(0.4, len(kinds) + 0.6)
        axes.set_xlim(0, 1.06 * max(max(errors) for errors in kinds.values()) or 1.0)
        axes.grid(axis="x")
        axes.set_xlabel("relative L2 error of the layer's weights")
        return svg_text(figure)


def lineage_figure(lineage: Mapping[str, Any]) -> str:
    """What was made from what, left to right; a graph as `store.lineage` gives it, with one node at least."""
    depths = _depths(lineage)
    columns: dict[int, list[Mapping[str, Any]]] = {}
    for node in lineage["nodes"]:
        columns.setdefault(depths[node["id"]], []).append(node)
    rows = max(len(column) for column in columns.values())
    places = {
        node["id"]: (float(depth), rows / 2 - (row + 0.5) * rows / len(column))
        for depth, column in columns.items()
        for row, node in enumerate(column)
    }
    with rc_context(STYLE):
        figure, axes = new_figure(0.42 * rows + 0.3)
        for edge in lineage["edges"]:
            arrow = {"arrowstyle": "-", "color": "#c6cbd1", "lw": 1.1}
            axes.annotate("", xy=places[edge["to"]], xytext=places[edge["from"]], arrowprops=arrow, zorder=1)
        for node in lineage["nodes"]:
            made_here = node["kind"] == "artifact"
            box = {"boxstyle": "round,pad=0.35", "fc": "#e4f0f4" if made_here else "#f6f7f8", "ec": "none"}
            label = f"{node['stage'] if made_here else node['name']}\n{node['digest'][:12]}"
            axes.text(*places[node["id"]], label, ha="center", va="center", fontsize=7, bbox=box, zorder=2)
        axes.set_xlim(-0.5, max(columns) + 0.5)
        axes.set_ylim(-rows / 2, rows / 2)
        _bare(axes)
        axes.set_yticks([])
        return svg_text(figure)


def _depths(lineage: Mapping[str, Any]) -> dict[str, int]:
    """Each node's longest way from a node that was made from nothing."""
    depths = {node["id"]: 0 for node in lineage["nodes"]}
    for _ in lineage["nodes"]:
        for edge in lineage["edges"]:
            depths[edge["to"]] = max(depths[edge["to"]], depths[edge["from"]] + 1)
    return depths


def smoothed(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and losses thinned to 200 points at most, each the mean of its stretch; empty for no points."""
    stretch = max(1, math.ceil(len(points) / CURVE_POINTS), len(points) // 40)
    groups = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return [group[-1][0] for group in groups], [sum(loss for _, loss in group) / len(group) for group in groups]


def _sweep_panel(axes: Axes, name: str, trials: Sequence[Mapping[str, Any]], best: str | None) -> None:
    values = [trial["params"].get(name) for trial in trials]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        places = [float(value) for value in numbers]
        if min(places) > 0 and max(places) / min(places) >= 4:
            axes.set_xscale("log")
        ticks = sorted(set(places))
        if len(ticks) <= 6:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.margins(x=0.15)
    else:
        labels = sorted({str(value) for value in values})
        places = [float(labels.index(str(value))) for value in values]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    for trial, place in zip(trials, places, strict=True):
        fill = ADAPTER_COLOUR if trial["id"] == best else "white"
        axes.scatter([place], [trial["loss"]], s=42, color=fill, edgecolors=ADAPTER_COLOUR, linewidths=1.4, zorder=3)
    axes.set_xlabel(name)
    axes.grid(axis="y")


def plain(text: str) -> str:
    """A name from data as it stands: no mathematics between dollar signs, no second line."""
    return " ".join(text.replace("$", r"\$").split())


def _positive(value: float | None) -> bool:
    """Whether a logarithmic axis has a place for `value`."""
    return value is not None and 0 < value < math.inf


def new_figure(height_in: float) -> tuple[Figure, Axes]:
    """An empty figure as wide as the page's text, and its only axes; drawn within `rc_context(STYLE)`."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots()


def _bare(axes: Axes) -> None:
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])


def svg_text(figure: Figure) -> str:
    """The figure as SVG; equal figures give equal bytes."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue()
