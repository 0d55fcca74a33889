"""From the bytes of a file to its records, with the line each starts on. Knows nothing of dataset formats.

JSON arrays, JSON Lines, single JSON objects, CSV, TSV, Parquet, and all of them under gzip are told apart by content: a
file named `.json` may hold JSON Lines. No file is held whole: memory is bounded by the longest record that is allowed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from qlora_core.data.containers.delimited import find_dialect, table_records
from qlora_core.data.containers.json_array import ArrayError, array_elements
from qlora_core.data.containers.json_value import parse_json, parse_line
from qlora_core.data.containers.parquet import PARQUET_MAGIC, parquet_records
from qlora_core.data.containers.record import Quarantined, Record, set_aside, too_long
from qlora_core.data.containers.source_stream import PIECE_BYTES, SourceStream
from qlora_core.data.row import RowError
from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError

HEAD_BYTES = 256 << 10

Records = Iterator[Record | Quarantined]


def read_records(file: SourceFile, max_row_bytes: int) -> Records:
    """All records of `file` in order, and what in it is no record; a record of over `max_row_bytes` is not parsed.

    Raises DataError, naming the file, if it is empty, cannot be opened or unpacked, is of no known kind, holds no
    record at all, or breaks at a place after which no record can be told from the next.
    """
    head = _read_head(file)
    if head.data.startswith(PARQUET_MAGIC):
        return _parquet(file, max_row_bytes)
    if head.data.lstrip().startswith(b"["):
        return _array(file, max_row_bytes) if _is_array(file.name, head) else _lines(file, max_row_bytes)
    if head.data.lstrip().startswith(b"{") or head.object_share > 0.5:
        return _lines_or_object(file, head, max_row_bytes)
    dialect = find_dialect(head.lines)
    if dialect is not None:
        return _table(file, partial(table_records, dialect=dialect, max_row_bytes=max_row_bytes))
    return _lines(file, max_row_bytes)


@dataclass(frozen=True, slots=True)
class _Head:
    """The first bytes of a file from the first that is not blank; whether they are all; how much looks like JSON Lines.

    `object_share` is the share of whole lines that are JSON objects.
    """

    data: bytes
    is_all: bool
    object_share: float

    @property
    def lines(self) -> list[str]:
        """The whole lines as text, however it is encoded."""
        text = _whole_lines(self.data, self.is_all).decode(errors="replace")
        return [line.removesuffix("\r") for line in text.split("\n")]


def _read_head(file: SourceFile) -> _Head:
    data = b""
    with SourceStream(file) as stream:
        while len(data) < HEAD_BYTES and (piece := stream.read(HEAD_BYTES - len(data))):
            data = (data + piece).lstrip(b" \r\n")
        is_all = not stream.read(1)
    if not data.strip():
        raise DataError(f"dataset file {file.name} is empty. Put rows into it, or take it out of data.sources")
    lines = [line for line in _whole_lines(data, is_all).split(b"\n") if line.strip()]
    objects = sum(_is_object(line) for line in lines)
    return _Head(data, is_all, objects / len(lines) if lines else 0.0)


def _whole_lines(data: bytes, is_all: bool) -> bytes:
    return data if is_all else data[: data.rfind(b"\n") + 1]


def _is_object(line: bytes) -> bool:
    try:
        return line.lstrip().startswith(b"{") and isinstance(parse_line(line), dict)
    except RowError:
        return False


def _is_array(name: str, head: _Head) -> bool:
    """JSON Lines may begin with a row that is a list, or with one that only begins like a list."""
    pieces = iter([head.data])
    found = 0
    try:
        for element in array_elements(name, lambda: next(pieces, b""), HEAD_BYTES):
            found += isinstance(element, Record)
    except ArrayError as fault:
        return (fault.cut and found > 0) or head.object_share <= 0.5
    return True


def _array(file: SourceFile, max_row_bytes: int) -> Records:
    try:
        with SourceStream(file) as stream:
            yield from array_elements(file.name, partial(stream.read, PIECE_BYTES), max_row_bytes)
    except ArrayError as fault:
        raise _broken(file, str(fault)) from fault


def _lines(file: SourceFile, max_row_bytes: int) -> Records:
    """JSON Lines. Raises DataError at the end if not one line was JSON."""
    found, first = False, None
    with SourceStream(file) as stream:
        for line in stream.lines(max_row_bytes):
            if line.data is not None and not line.data.strip():
                continue
            outcome = _line_record(file.name, line.number, line.data, max_row_bytes)
            if isinstance(outcome, Record):
                found = True
            elif first is None:
                first = outcome
            yield outcome
    if not found:
        where = f"; as JSON Lines, line {first.line} is {first.reason}" if first else ""
        raise _broken(file, f"no record could be read{where}")


def _line_record(name: str, number: int, data: bytes | None, max_row_bytes: int) -> Record | Quarantined:
    if data is None:
        return set_aside(name, number, too_long(max_row_bytes))
    try:
        return Record(number, parse_line(data))
    except RowError as error:
        return set_aside(name, number, error)


def _lines_or_object(file: SourceFile, head: _Head, max_row_bytes: int) -> Records:
    """JSON Lines, or one object written over many lines, which is a single record."""
    value = None if _is_object(head.data.partition(b"\n")[0]) else _whole_object(file, max_row_bytes)
    if value is None:
        yield from _lines(file, max_row_bytes)
    else:
        yield Record(1, value)


def _whole_object(file: SourceFile, max_row_bytes: int) -> Any:
    with SourceStream(file) as stream:
        data = b""
        while len(data) <= max_row_bytes and (piece := stream.read(PIECE_BYTES)):
            data += piece
    if len(data) > max_row_bytes:
        return None
    try:
        return parse_json(data.decode())
    except (RowError, UnicodeDecodeError):
        return None


def _table(file: SourceFile, records: Callable[[str, SourceStream], Records]) -> Records:
    with SourceStream(file) as stream:
        yield from records(file.name, stream)


def _parquet(file: SourceFile, max_row_bytes: int) -> Records:
    with SourceStream(file) as stream:
        yield from parquet_records(file.name, stream.seekable(), max_row_bytes)


def _broken(file: SourceFile, detail: str) -> DataError:
    return DataError(
        f"dataset file {file.name} cannot be read as JSON: {detail}. It is no CSV, TSV or Parquet either. Mend or "
        "fetch the file again; written as JSON Lines (one row a line), bad rows are set aside one by one"
    )
