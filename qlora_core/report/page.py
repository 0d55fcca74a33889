"""What every page of ours shares: templates with escaping, how numbers are written, embedded figures.

Knows nothing of what a page is about.
"""

import base64
import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

SHORT_DIGEST = 12
MISSING = "–"


def template(name: str) -> Template:
    """The template file `name` of this package. Text is escaped; a name that the caller did not give is an error."""
    environment = Environment(
        loader=PackageLoader("qlora_core.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "points": _points}
    environment.filters |= {"count": _count, "short": _short, "value": _value}
    return environment.get_template(name)


def embedded(svg: str) -> str:
    """An SVG text as the address of an image, so that a page needs no other file."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.{digits}f}".replace("-", "−")


def _percent(value: float | None, digits: int = 0) -> str:
    return MISSING if value is None else f"{value:.{digits}%}".replace("-", "−")


def _points(value: float | None, digits: int = 1) -> str:
    """A difference of two shares, in percentage points and with its sign."""
    return MISSING if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _short(digest: str | None) -> str:
    return digest[:SHORT_DIGEST] if digest else MISSING


def _value(value: Any) -> str:
    """A setting as it would stand in the config: numbers short, nothing as a dash."""
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)
