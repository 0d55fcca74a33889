"""One JSON value from its text, with limits that do not depend on who calls. Knows nothing of files."""

import json
import re
from typing import Any

from qlora_core.data.row import RowError

# Python's own limit depends on how deep the caller is in calls; a conversation tree of 200 turns needs 402.
MAX_NESTING = 500

_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_BRACKET = re.compile(r"[\[{}\]]")


def parse_line(raw: bytes) -> Any:
    """The value of a line. Raises RowError for bytes that are no UTF-8 and as `parse_json` does."""
    try:
        return parse_json(raw.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte {error.start + 1} of the line") from error


def parse_json(text: str) -> Any:
    """The value of a text. Raises RowError for what is no JSON, and for one nested deeper than `MAX_NESTING`."""
    if text.count("[") + text.count("{") > MAX_NESTING and _nesting(text) > MAX_NESTING:
        raise _too_deep()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise RowError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise _too_deep() from error


def _too_deep() -> RowError:
    return RowError(f"not JSON: nested too deep; {MAX_NESTING} levels are allowed")


def _nesting(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
        if deepest > MAX_NESTING:
            break
    return deepest
