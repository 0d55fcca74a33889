"""The page of a tournament: one HTML file that needs nothing else. Shows what was summarised; rates nothing."""

import math
from collections.abc import Mapping
from typing import Any

from qlora_core.report.heat_map import heat_map
from qlora_core.report.page import template


def tournament_page(summary: Mapping[str, Any]) -> str:
    """The page of what `summarise_tournament` gave; equal figures give equal bytes. Text from outside is escaped."""
    effect = summary["rated"]["order_effect"]
    return template("tournament.html.jinja").render(
        **{**summary, "slices": None if summary["slices"] is None else heat_map(summary["slices"])},
        order_odds=None if effect is None else math.exp(effect),
    )
