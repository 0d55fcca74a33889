"""Chosen columns of one side of a curated set, a batch at a time. Knows nothing of what is in them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.shards import shard_files
from qlora_core.errors import DataError

BATCH_ROWS = 8192


def split_schema(folder: Path, side: str) -> pa.Schema:
    """The columns of a side, as its first file states them. Raises DataError as `shard_files` does."""
    path = shard_files(folder, side)[0]
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def iter_columns(folder: Path, side: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The named columns in batches of up to `BATCH_ROWS` rows, in the order written.

    Raises DataError for a missing file, one that is no Parquet, and one without these columns.
    """
    for path in shard_files(folder, side):
        try:
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow, names)
                yield from file.iter_batches(BATCH_ROWS, columns=list(names))
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error


def read_columns(folder: Path, side: str, names: Sequence[str]) -> pa.Table:
    """The named columns of a whole side. Raises DataError as `iter_columns` does."""
    schema = split_schema(folder, side)
    _check_columns(shard_files(folder, side)[0], schema, names)
    batches = [batch.select(list(names)) for batch in iter_columns(folder, side, names)]
    return pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in names]))


def _check_columns(path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
    missing = sorted(set(names) - set(schema.names))
    if missing:
        raise DataError(
            f"{str(path)!r} has no column {', '.join(missing)}; it has {', '.join(schema.names)}. Curate the data again"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{str(path)!r} is no split of a curated set: {error}. Curate the data again")
