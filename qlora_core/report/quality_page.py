"""The quality report of a quantized base as one HTML page that needs nothing else. Shows figures; measures none."""

from collections.abc import Mapping
from typing import Any

from qlora_core.report.page import embedded, template
from qlora_core.report.quality_figures import errors_figure, outliers_figure, perplexity_figure

FEW_DOCUMENTS = 10


def quality_page(quality: Mapping[str, Any]) -> str:
    """The page of what `write_quality` measured; equal figures give equal bytes. Text from outside is escaped."""
    layers, formats = quality["layers"], quality["formats"]
    drawn = {
        "errors": errors_figure(layers),
        "outliers": outliers_figure(layers),
        "perplexity": perplexity_figure(quality["full_precision"]["perplexity"], formats),
    }
    stored = next(row for row in formats if row["stored"])
    return template("quality.html.jinja").render(
        **quality,
        stored=stored,
        few_documents=FEW_DOCUMENTS,
        worst=sorted(layers, key=lambda layer: -layer["output_relative_l2"])[:1],
        figures={name: embedded(svg) if svg else None for name, svg in drawn.items()},
    )
