"""The rows of a Parquet file, a small batch at a time. A row's number is its line; what is null is left out."""

from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.containers.record import Quarantined, Record, set_aside, too_long
from qlora_core.errors import DataError

PARQUET_MAGIC = b"PAR1"
_BATCH_ROWS = 256
# What a stored value may do when Python is to hold it: text that is no text, a date beyond Python's calendar.
_UNREADABLE = (pa.ArrowException, ValueError, OverflowError, RecursionError)


def parquet_records(name: str, file: IO[bytes], max_row_bytes: int) -> Iterator[Record | Quarantined]:
    """Every row as `{column: value}`. A value that Python cannot hold, invalid UTF-8 say, sets its row aside.

    Raises DataError for a file that is damaged, naming the row that had been reached.
    """
    row = 0
    try:
        for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=_BATCH_ROWS):
            for record in _batch_records(name, row, batch, max_row_bytes):
                row += 1
                yield record
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"dataset file {name} is a damaged Parquet file: after row {row}, {error}. Write or fetch it again, or "
            "take it out of data.sources"
        ) from error


def _batch_records(name: str, before: int, batch: pa.RecordBatch, max_bytes: int) -> Iterator[Record | Quarantined]:
    if batch.nbytes <= max_bytes:
        try:
            rows = batch.to_pylist()
        except _UNREADABLE:
            pass  # looked at row by row instead
        else:
            yield from (_record(before + index, fields) for index, fields in enumerate(rows, start=1))
            return
    for index in range(batch.num_rows):
        yield _single_record(name, before + index + 1, batch.slice(index, 1), max_bytes)


def _single_record(name: str, row: int, batch: pa.RecordBatch, max_bytes: int) -> Record | Quarantined:
    if batch.nbytes > max_bytes:
        return set_aside(name, row, too_long(max_bytes))
    try:
        return _record(row, batch.to_pylist()[0])
    except _UNREADABLE as error:
        kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "unreadable value"
        return set_aside(name, row, f"{kind}: {error}")


def _record(row: int, fields: dict[str, Any]) -> Record:
    return Record(row, {column: value for column, value in fields.items() if value is not None})
