"""The page of the most telling disagreements: one HTML file that needs nothing else. Shows rankings; makes none."""

from collections.abc import Sequence

from qlora_core.evaluation.disagreements import Ranking
from qlora_core.report.page import template


def disagreements_page(title: str, disagreements: Sequence[Ranking]) -> str:
    """The page of these rankings, in their order; equal ones give equal bytes. Text from outside is escaped."""
    return template("disagreements.html.jinja").render(title=title, disagreements=disagreements)
