"""Tables as text: values separated by commas, semicolons or tabs, quoted as RFC 4180 says. Every value is a text.

FLAN writes tab-separated pairs without a header; two columns without known names are read as `inputs` and `targets`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_core.data.containers.record import Quarantined, Record, set_aside, too_long
from qlora_core.data.containers.source_stream import Line, SourceStream
from qlora_core.errors import DataError

HEADERLESS = ("inputs", "targets")
# A header with one of these names is one; a first line of anything else may be a row.
KNOWN_NAMES = frozenset(
    {
        "answer",
        "best_answer",
        "chosen",
        "completion",
        "context",
        "input",
        "inputs",
        "instruction",
        "output",
        "prompt",
        "query",
        "question",
        "rejected",
        "response",
        "system",
        "target",
        "targets",
        "text",
    }
)
_NAME = re.compile(r"\w[\w .()/-]{0,59}")
_MARK = "\ufeff"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a table is written: the mark between values, whether values may be quoted, the names of its columns."""

    delimiter: str
    quoted: bool
    names: tuple[str, ...]
    has_header: bool


def find_dialect(lines: Sequence[str]) -> Dialect | None:
    """The dialect of a table that begins with these lines, its first line not blank; None if it is no table.

    A comma or semicolon makes a table only under a header: two names or more, all different. Names lose their case, and
    blanks in them become `_`.
    """
    if not lines:
        return None
    if "\t" in lines[0]:
        return _tabbed(lines)
    for delimiter in (",", ";"):
        names = _names(split_values(lines[0], delimiter, quoted=True))
        if names is not None and len(names) > 1 and _is_table(lines, delimiter, len(names)):
            return Dialect(delimiter, True, names, has_header=True)
    return None


def split_values(text: str, delimiter: str, *, quoted: bool) -> list[str] | None:
    """The values of a line, or None if a quoted one is still open at its end."""
    values = _Values(delimiter)
    return values.found if values.add_line(text, quoted=quoted) else None


class _Values:
    """The values of one record, taken in line by line.

    A quotation mark quotes only as the first character of a value; what follows a closing one is taken as it stands.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._open: list[str] | None = None
        self.found: list[str] = []

    def add_line(self, text: str, *, quoted: bool) -> bool:
        """Take in a line; False if the record goes on in the next."""
        at = 0
        while True:
            lead = ""
            if self._open is None and quoted and text.startswith('"', at):
                self._open, at = [], at + 1
            if self._open is not None:
                end = _closing_quote(text, at)
                self._open.append(text[at : end if end >= 0 else len(text)])
                if end < 0:
                    return False
                lead, self._open, at = "\n".join(self._open).replace('""', '"'), None, end + 1
            end = text.find(self._delimiter, at)
            self.found.append(lead + text[at : end if end >= 0 else len(text)])
            if end < 0:
                return True
            at = end + 1


def table_records(
    name: str, stream: SourceStream, dialect: Dialect, max_row_bytes: int
) -> Iterator[Record | Quarantined]:
    """The rows under the header as `{column: text}`, with the line each starts on. Blank lines are passed over.

    A row with too many or too few values is set aside. Raises DataError for a quoted value that does not end within
    `max_row_bytes`: where the next row starts could only be guessed.
    """
    header_due = dialect.has_header
    lines = stream.lines(max_row_bytes)
    for line in lines:
        if line.data is None:
            yield set_aside(name, line.number, too_long(max_row_bytes))
        elif line.data.strip():
            values, is_text = _record_values(name, line, lines, dialect, max_row_bytes)
            if header_due:
                header_due = False
            elif not is_text:
                yield set_aside(name, line.number, "not UTF-8: the row holds bytes that are no text")
            elif len(values) != len(dialect.names):
                count = f"{len(values)} values where the table has {len(dialect.names)}"
                yield set_aside(name, line.number, f"wrong columns: {count}")
            else:
                yield Record(line.number, dict(zip(dialect.names, values, strict=True)))


def _record_values(
    name: str, first: Line, following: Iterator[Line], dialect: Dialect, max_bytes: int
) -> tuple[list[str], bool]:
    """The values of the record that starts on line `first`, and whether all of it is text."""
    values, size, is_text = _Values(dialect.delimiter), 0, True
    line: Line | None = first
    while line is not None and line.data is not None and (size := size + len(line.data)) <= max_bytes:
        text, line_is_text = _decode(line.data)
        is_text = is_text and line_is_text
        if values.add_line(text, quoted=dialect.quoted):
            return values.found, is_text
        line = next(following, None)
    raise DataError(
        f"dataset file {name}: the quoted value that starts on line {first.number} does not end within the file or "
        f"{max_bytes / 2**20:g} MB. Close it, double the quotation marks inside of it, or raise data.readers.max_row_mb"
    )


def _decode(data: bytes) -> tuple[str, bool]:
    text = data.decode(errors="replace")
    return text, "\ufffd" not in text or text.encode() == data


def _closing_quote(text: str, at: int) -> int:
    while (end := text.find('"', at)) >= 0:
        if not text.startswith('""', end):
            return end
        at = end + 2
    return -1


def _tabbed(lines: Sequence[str]) -> Dialect | None:
    quoted = _has_quoted_values(lines)
    first = split_values(lines[0], "\t", quoted=quoted) or []
    names = _names(first)
    if names is not None and KNOWN_NAMES.intersection(names):
        return Dialect("\t", quoted, names, has_header=True)
    if len(first) == len(HEADERLESS):
        return Dialect("\t", quoted, HEADERLESS, has_header=False)
    return Dialect("\t", quoted, names, has_header=True) if names is not None else None


def _has_quoted_values(lines: Sequence[str]) -> bool:
    """Whether a program that quotes wrote these lines. By its definition a tab-separated file has no quoting.

    A doubled quotation mark inside a quoted value shows it, a value that goes on after its closing mark disproves it.
    """
    starts = [value for line in lines for value in line.split("\t") if value.startswith('"')]
    closed = [value for value in starts if _closing_quote(value, 1) >= 0]
    return all(_closing_quote(value, 1) == len(value) - 1 for value in closed) and any(
        '""' in value[1:-1] for value in starts
    )


def _is_table(lines: Sequence[str], delimiter: str, columns: int) -> bool:
    """Whether any line under the header has its columns or opens a quoted value; prose with commas does not."""
    rows = [split_values(line, delimiter, quoted=True) for line in lines[1:] if line.strip()]
    return not rows or any(row is None or len(row) == columns for row in rows)


def _names(values: Sequence[str] | None) -> tuple[str, ...] | None:
    names = [value.strip().removeprefix(_MARK) for value in values or ()]
    if not names or not all(_NAME.fullmatch(name) for name in names):
        return None
    folded = tuple("_".join(name.casefold().split()) for name in names)
    return folded if len(set(folded)) == len(folded) else None
