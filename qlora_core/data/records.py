"""From the bytes of a file to its JSON records, with the line each starts on. Knows nothing of dataset formats.

JSON arrays, JSON Lines and gzip are told apart by content: a file named `.json` may hold JSON Lines.
"""

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from typing import Any

from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
UTF8_MARK = b"\xef\xbb\xbf"
BLANKS = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One parsed JSON value and the line (from 1) on which it starts."""

    line: int
    value: Any


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A record set aside: its file's name, its line (from 1) and why. `reason` is `kind: detail`."""

    file: str
    line: int
    reason: str

    @property
    def kind(self) -> str:
        """The part of the reason before the first colon."""
        return self.reason.partition(":")[0]


def read_records(file: SourceFile) -> tuple[list[Record], list[Quarantined]]:
    """All records of `file` in order, and the lines that are no JSON.

    Raises DataError, naming the file, if it is empty, cannot be opened or unpacked, is a broken JSON array, or holds no
    record at all.
    """
    data = _read_bytes(file)
    if not data.strip():
        raise DataError(f"dataset file {file.name} is empty. Put rows into it, or take it out of data.sources")
    if data.lstrip()[:1] == b"[":
        return _read_array(file, data)
    records, faults = _read_lines(file, data)
    if records:
        return records, faults
    return _read_single_object(file, data, faults)


def _read_bytes(file: SourceFile) -> bytes:
    try:
        data = file.path.read_bytes()
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"dataset file {file.name} is a damaged gzip file ({error}). Fetch it again, or take it out of data.sources"
        ) from error
    except OSError as error:
        raise DataError(
            f"dataset file {file.name} cannot be read: {error.strerror or error}. Check its permissions"
        ) from error
    return data.removeprefix(UTF8_MARK)


def _read_array(file: SourceFile, data: bytes) -> tuple[list[Record], list[Quarantined]]:
    try:
        return _array_records(data.decode()), []
    except (ValueError, RecursionError) as error:
        records, faults = _read_lines(file, data)
        # Lines of an indented array may parse by chance; JSON Lines with some bad rows parse for the most part.
        if len(records) > len(faults) and all(isinstance(record.value, dict) for record in records):
            return records, faults
        raise _broken(file, error) from error


def _array_records(text: str) -> list[Record]:
    decoder = json.JSONDecoder()
    records: list[Record] = []
    position = _skip_blanks(text, 0) + 1
    line, counted = 1, 0
    while True:
        position = _skip_blanks(text, position)
        if not records and text[position : position + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, position), position
        value, position = decoder.raw_decode(text, position)
        records.append(Record(line, value))
        position = _skip_blanks(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            raise json.JSONDecodeError("expected ',' or ']'", text, position)
        position += 1
    end = _skip_blanks(text, position + 1)
    if end != len(text):
        raise json.JSONDecodeError("text after the end of the array", text, end)
    return records


def _skip_blanks(text: str, position: int) -> int:
    blanks = BLANKS.match(text, position)
    return blanks.end() if blanks else position


def _read_lines(file: SourceFile, data: bytes) -> tuple[list[Record], list[Quarantined]]:
    records: list[Record] = []
    faults: list[Quarantined] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(Record(number, json.loads(line.decode())))
        except UnicodeDecodeError as error:
            faults.append(Quarantined(file.name, number, f"not UTF-8: byte {error.start + 1} of the line"))
        except json.JSONDecodeError as error:
            faults.append(Quarantined(file.name, number, f"not JSON: {error.msg} at column {error.colno}"))
        except ValueError as error:
            faults.append(Quarantined(file.name, number, f"not JSON: {error}"))
        except RecursionError:
            faults.append(Quarantined(file.name, number, "not JSON: nested too deep"))
    return records, faults


def _read_single_object(
    file: SourceFile, data: bytes, faults: list[Quarantined]
) -> tuple[list[Record], list[Quarantined]]:
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        first = faults[0] if faults else None
        where = f"; as JSON Lines, line {first.line} is {first.reason}" if first else ""
        raise _broken(file, error, where) from error
    return [Record(1, value)], []


def _broken(file: SourceFile, error: Exception, more: str = "") -> DataError:
    detail = "nested too deep" if isinstance(error, RecursionError) else str(error)
    return DataError(
        f"dataset file {file.name} cannot be read as JSON: {detail}{more}. Mend or fetch the file again; written as "
        "JSON Lines (one row a line), bad rows are set aside one by one"
    )
