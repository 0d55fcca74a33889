"""JSON Lines files of validated rows. Knows line numbers and pydantic models, and nothing of what the rows mean."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from qlora_core.errors import EvaluationError

SHOWN_ERRORS = 5
RowT = TypeVar("RowT", bound=BaseModel)


def read_rows(path: Path, row_type: type[RowT]) -> list[RowT]:
    """Every row of `path`, in file order; blank lines are skipped, an empty file gives an empty list.

    Raises EvaluationError naming the first five bad lines (counted from 1) with what is wrong in each.
    """
    rows: list[RowT] = []
    faults: list[str] = []
    for number, line in _numbered_lines(path):
        try:
            rows.append(row_type.model_validate_json(line))
        except ValidationError as error:
            faults.append(f"line {number}: {_describe(error)}")
    if faults:
        shown = "\n  ".join(faults[:SHOWN_ERRORS])
        more = f"\n  and {len(faults) - SHOWN_ERRORS} more" if len(faults) > SHOWN_ERRORS else ""
        raise EvaluationError(f"{path}: {len(faults)} bad line(s); mend or remove them:\n  {shown}{more}")
    return rows


def write_rows(path: Path, rows: Iterable[BaseModel]) -> None:
    """Write one JSON object per line, in order; an existing file is replaced."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(row.model_dump_json() + "\n")


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror}); name a JSON Lines file") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    # Only \n ends a row: str.splitlines would also cut at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _describe(error: ValidationError) -> str:
    parts = []
    for fault in error.errors(include_url=False, include_context=False):
        where = ".".join(str(key) for key in fault["loc"]) or "row"
        value = "" if fault["type"] in ("missing", "json_invalid") else f" (got {fault['input']!r:.80})"
        parts.append(f"{where}: {fault['msg']}{value}")
    return "; ".join(parts)
