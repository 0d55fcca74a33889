"""The decision on one page of Markdown, for where a whole report is too much: verdict, why, figures, drift, slices.

Knows how it is said, and decides nothing.
"""

import html
from collections.abc import Mapping, Sequence


def decision_page(
    verdict: str,
    reasons: Sequence[str],
    *,
    compared_with: str,
    figures: Sequence[str],
    findings: tuple[Sequence[str], Sequence[str]],
    links: Mapping[str, str],
) -> str:
    """The page. `findings` are sentences on drift and on weak slices; `links` are shown as name and address.

    Texts come from data too, so that marks in them are shown and not obeyed. Parts with nothing to say are left out.
    """
    drift, weak = findings
    parts = [
        (f"# {verdict}", [f"Compared with {compared_with}."]),
        ("## Why", _points(reasons)),
        ("## Figures", _points(figures)),
        ("## Data since the champion", _points(drift)),
        ("## Worst slices", _points(weak)),
        ("## More", [f"- {name}: `{address}`" for name, address in links.items()]),
    ]
    return "\n\n".join(f"{head}\n\n" + "\n".join(lines) for head, lines in parts if lines) + "\n"


def _points(lines: Sequence[str]) -> list[str]:
    return [f"- {_plain(line)}" for line in lines]


def _plain(text: str) -> str:
    escaped = html.escape(text, quote=False)
    for mark in "\\`*_[]!|":
        escaped = escaped.replace(mark, f"\\{mark}")
    return " ".join(escaped.split())
