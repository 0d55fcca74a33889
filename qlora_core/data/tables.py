"""The Parquet files of a curated set: what is in them, written so that equal rows give equal bytes.

A side of the split is a number of shards, written as the rows come. Knows nothing of why a row is kept.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.ledger import Dropped
from qlora_core.data.loss_mask import MaskedRow
from qlora_core.data.records import Quarantined
from qlora_core.data.shards import shard_name
from qlora_core.errors import DataError

# `train` says for each message whether it carries loss; `language` is what the data states, `tokens` the length of
# `input_ids`. `rejected_ids` and `rejected_mask` are the conversation with the worse answer of a preference pair, null
# where there is none that can be trained on. Measured tags follow as `tag_<name>`.
ROW_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), nullable=False),
        pa.field("train", pa.list_(pa.bool_()), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("rejected", pa.string()),
        pa.field("tools", pa.string()),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("rejected_ids", pa.list_(pa.int32())),
        pa.field("rejected_mask", pa.list_(pa.bool_())),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("licence", pa.string()),
        pa.field("generator", pa.string()),
        pa.field("language", pa.string()),
        pa.field("group_keys", pa.list_(pa.string()), nullable=False),
    ]
)
DROPPED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("matched_id", pa.string()),
        pa.field("tokens", pa.int64()),
        pa.field("score", pa.float64()),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
TAG_PREFIX = "tag_"
# Rows of one row group, and the most that wait in memory to be written.
ROW_GROUP_ROWS = 1024


class SplitWriter:
    """Writes one side of the split as shards of up to `shard_rows` rows, in batches, rows by rising id.

    `rows` says beforehand how many will come, for a shard's name says of how many it is. `tags` are the names and
    types of the measured columns. The bytes depend on the rows and on `shard_rows`, not on the batches. Used as a
    context manager: it raises DataError at the end if another number of rows came.
    """

    def __init__(
        self, folder: Path, side: str, rows: int, shard_rows: int, tags: Mapping[str, pa.DataType] | None = None
    ) -> None:
        self._folder = folder
        self._side = side
        self._rows = rows
        self._shard_rows = shard_rows
        self._shards = max(1, -(-rows // shard_rows))
        self._tags = dict(tags or {})
        added = [pa.field(TAG_PREFIX + name, kind) for name, kind in self._tags.items()]
        self._schema = pa.schema([*ROW_SCHEMA, *added])
        self._waiting: list[pa.Table] = []
        self._written = 0
        self._last_id = ""
        self._file: pq.ParquetWriter | None = None

    def write(self, rows: pa.Table, tags: Mapping[str, pa.Array | pa.ChunkedArray] | None = None) -> None:
        """Take the next rows (a table of ROW_SCHEMA) and their tags, a value a row.

        Raises DataError for rows out of order or other tags.
        """
        given = dict(tags or {})
        if set(given) != set(self._tags) or any(len(column) != len(rows) for column in given.values()):
            raise DataError(
                f"tags {sorted(given)} of {[len(column) for column in given.values()]} rows do not belong to "
                f"{len(rows)} rows with tags {sorted(self._tags)}"
            )
        ids = [self._last_id, *rows.column("id").to_pylist()]
        if any(one >= other for one, other in pairwise(ids)):
            raise DataError(f"rows of {self._side} do not come by rising id; sort them and name no id twice")
        self._last_id = ids[-1]
        columns = {name: rows.column(name) for name in ROW_SCHEMA.names}
        columns |= {TAG_PREFIX + name: given[name] for name in self._tags}
        self._waiting.append(pa.table(columns, schema=self._schema))
        self._write_full_groups()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()

    def _write_full_groups(self) -> None:
        while self._waiting_rows() and self._waiting_rows() >= self._next_group_rows():
            self._write_group()

    def _next_group_rows(self) -> int:
        left_in_shard = self._shard_rows - self._written % self._shard_rows
        return min(ROW_GROUP_ROWS, left_in_shard)

    def _waiting_rows(self) -> int:
        return sum(len(table) for table in self._waiting)

    def _write_group(self) -> None:
        waiting = pa.concat_tables(self._waiting)
        group = waiting.slice(0, self._next_group_rows())
        self._waiting = [waiting.slice(len(group))]
        if self._file is None:
            number = self._written // self._shard_rows
            path = self._folder / shard_name(self._side, number, self._shards)
            self._file = pq.ParquetWriter(path, self._schema, compression="zstd")
        # One chunk a column: chunk borders would end pages, and the bytes would tell of the batches.
        self._file.write_table(group.combine_chunks(), row_group_size=ROW_GROUP_ROWS)
        self._written += len(group)
        if self._written % self._shard_rows == 0:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _finish(self) -> None:
        if self._waiting_rows() or not self._rows:
            self._waiting = self._waiting or [self._schema.empty_table()]
            self._write_group()
        self._close_file()
        if self._written != self._rows:
            raise DataError(
                f"{self._written} rows of {self._side} were written, {self._rows} were announced. This is a fault in "
                "curation; please report it"
            )


def row_columns(rows: Sequence[MaskedRow]) -> pa.Table:
    """The rows as a table of ROW_SCHEMA; `prompt` and `reference` are those of the last trained answer."""
    last = [masked.turns[-1] for masked in rows]
    plain = ("id", "source", "line", "category", "licence", "generator", "language", "tools", "rejected")
    columns: dict[str, list[Any]] = {
        **{name: [getattr(masked.row, name) for masked in rows] for name in plain},
        "group_keys": [list(masked.row.group_keys) for masked in rows],
        "messages": [[{"role": m.role, "content": m.content} for m in masked.row.messages] for masked in rows],
        "train": [[message.train for message in masked.row.messages] for masked in rows],
        "prompt": [turn.prompt for turn in last],
        "reference": [m.row.messages[t.message_index].content for m, t in zip(rows, last, strict=True)],
        "input_ids": [masked.input_ids for masked in rows],
        "loss_mask": [masked.loss_mask for masked in rows],
        "rejected_ids": [masked.rejected_ids for masked in rows],
        "rejected_mask": [masked.rejected_mask for masked in rows],
        "tokens": [len(masked.input_ids) for masked in rows],
    }
    return pa.table(columns, schema=ROW_SCHEMA)


def write_dropped(path: Path, dropped: Sequence[Dropped]) -> None:
    """The ledger of dropped rows, by source, line and rule."""
    ordered = sorted(dropped, key=lambda drop: (drop.source, drop.line, drop.rule, drop.id))
    columns = {name: [getattr(drop, name) for drop in ordered] for name in DROPPED_SCHEMA.names}
    _write(path, pa.table(columns, schema=DROPPED_SCHEMA))


def write_quarantine(path: Path, quarantined: Sequence[Quarantined]) -> None:
    """The records set aside, by file, line and reason."""
    ordered = sorted(quarantined, key=lambda entry: (entry.file, entry.line, entry.reason))
    columns = {name: [getattr(entry, name) for entry in ordered] for name in QUARANTINE_SCHEMA.names}
    _write(path, pa.table(columns, schema=QUARANTINE_SCHEMA))


def _write(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd")
