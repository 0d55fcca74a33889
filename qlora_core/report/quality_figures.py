"""The figures of a quality report as SVG texts. Knows its rows of layers and formats, nothing of HTML or of models."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qlora_core.report.figures import (
    ADAPTER_COLOUR,
    BASE_COLOUR,
    STYLE,
    TRIAL_COLOURS,
    WIDTH_IN,
    new_figure,
    plain,
    svg_text,
)

OTHER_FORMAT_COLOUR = "#b9c6cf"
_MARKS = "os^Dv<>P"


def errors_figure(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """Relative L2 error of every layer's weights and outputs by depth, one line for each kind; None without layers."""
    if not layers:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.6), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        _by_depth(panels[0], layers, "relative_l2")
        _by_depth(panels[1], layers, "output_relative_l2")
        panels[0].set_ylabel("weights")
        panels[1].set_ylabel("outputs")
        panels[1].set_xlabel("depth")
        _kinds_legend(panels[0])
        return svg_text(figure)


def outliers_figure(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """Share of outlier blocks of every layer by depth; None where there is not one such block."""
    if not any(layer["outlier_blocks"] for layer in layers):
        return None
    with rc_context(STYLE):
        figure, axes = new_figure(2.6)
        _by_depth(axes, layers, "outlier_blocks")
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        axes.set_ylabel("outlier blocks")
        axes.set_xlabel("depth")
        _kinds_legend(axes)
        return svg_text(figure)


def perplexity_figure(full_precision: float, formats: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity of the full-precision base and of every format as bars; the stored format's stands out."""
    bars = [("full precision", full_precision, BASE_COLOUR)]
    for row in formats:
        label = plain(row["label"]) + (", double quant." if row["double_quant"] else "")
        bars.append((label, row["perplexity"], ADAPTER_COLOUR if row["stored"] else OTHER_FORMAT_COLOUR))
    with rc_context(STYLE):
        figure, axes = new_figure(0.3 * len(bars) + 0.5)
        places = range(len(bars), 0, -1)
        most = max(value for _, value, _ in bars)
        axes.barh(places, [value for _, value, _ in bars], height=0.66, color=[colour for _, _, colour in bars])
        for place, (_, value, _) in zip(places, bars, strict=True):
            axes.text(value + 0.01 * most, place, f"{value:,.4g}", va="center", color="#3d444d")
        axes.axvline(full_precision, color="#3d444d", lw=0.8, ls=":")
        axes.set_yticks(list(places), [label for label, _, _ in bars])
        axes.set_xlim(0, 1.12 * most)
        axes.set_xlabel("perplexity on the text (less is better)")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return svg_text(figure)


def _by_depth(axes: Axes, layers: Sequence[Mapping[str, Any]], figure: str) -> None:
    for number, (kind, points) in enumerate(_kinds(layers, figure).items()):
        colour, mark = TRIAL_COLOURS[number % len(TRIAL_COLOURS)], _MARKS[number % len(_MARKS)]
        depths, values = zip(*points, strict=True)
        axes.plot(depths, values, color=colour, marker=mark, markersize=4, lw=1.2, label=plain(kind))
    axes.set_ylim(0, 1.08 * max(layer[figure] for layer in layers) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")


def _kinds(layers: Sequence[Mapping[str, Any]], figure: str) -> dict[str, list[tuple[int, float]]]:
    """(depth, value) of each layer by the last part of its name; depth is the first number in the name, else 0."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        parts = layer["name"].split(".")
        depth = next((int(part) for part in parts if part.isdecimal()), 0)
        kinds.setdefault(parts[-1], []).append((depth, layer[figure]))
    return kinds


def _kinds_legend(axes: Axes) -> None:
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8)
