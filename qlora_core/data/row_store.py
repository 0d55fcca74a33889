"""Many rows in little memory: Arrow batches behind the face of a sequence. Knows nothing of where rows come from.

A row costs its text and some hundred bytes; as Python objects it would cost a kilobyte more. Rows are made when they
are looked at and belong to whoever looks.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qlora_core.data.row import Message, Role, Row
from qlora_core.errors import DataError

BATCH_ROWS = 2048
# A batch is also closed at so many characters, so that what waits for it is small beside what is stored.
BATCH_CHARS = 4 << 20

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
TRAINED = 0x80
_CODES: dict[tuple[Role, bool], int] = {
    (role, train): code | (TRAINED if train else 0) for code, role in enumerate(ROLES) for train in (False, True)
}
_TURNS = {code: turn for turn, code in _CODES.items()}

# Values that few rows have for themselves are stored once a batch.
_REPEATED = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("turns", pa.binary(), nullable=False),  # a byte a turn: its role, and whether it is trained
        pa.field("contents", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
        pa.field("source", _REPEATED, nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("category", _REPEATED),
        pa.field("licence", _REPEATED),
        pa.field("generator", _REPEATED),
        pa.field("trimmed", pa.int32(), nullable=False),
        pa.field("language", _REPEATED),
        pa.field("tools", _REPEATED),
        pa.field("rejected", pa.string()),
        pa.field("group_keys", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
    ]
)
# The fields of a row after its messages, in the order of its constructor.
ROW_FIELDS = tuple(name for name in SCHEMA.names if name not in ("id", "turns", "contents"))


class RowStore(Sequence[Row]):
    """Rows in the order they were added. Every field comes back exactly as it went in.

    A slice, like `select`, is a view that copies no row. Adding rows leaves earlier views as they were. For one
    writer at a time.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._starts: list[int] = []
        self._stored = 0
        self._pending: list[Row] = []
        self._pending_chars = 0
        self.extend(rows)

    @classmethod
    def concatenate(cls, stores: Iterable["RowStore"]) -> "RowStore":
        """One store with the rows of all, one store after the other; their batches are shared, not copied."""
        whole = cls()
        for store in stores:
            store._flush()
            for batch in store._batches:
                whole._add(batch)
        return whole

    def append(self, row: Row) -> None:
        """Add a row at the end. Raises DataError, at the latest when a batch is closed, for text that is no Unicode."""
        self._pending.append(row)
        self._pending_chars += sum(len(message.content) for message in row.messages)
        self._pending_chars += len(row.rejected or "") + len(row.tools or "")
        if len(self._pending) >= BATCH_ROWS or self._pending_chars >= BATCH_CHARS:
            self._flush()

    def extend(self, rows: Iterable[Row]) -> None:
        """Add rows at the end, in their order."""
        for row in rows:
            self.append(row)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in their order, some at a time, in the columns of SCHEMA."""
        self._flush()
        yield from list(self._batches)

    def append_batch(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a batch in the columns of SCHEMA, which is shared, not copied."""
        self._flush()
        if len(batch):
            self._add(batch)

    @property
    def nbytes(self) -> int:
        """The Arrow size of all rows, in bytes."""
        self._flush()
        return sum(batch.nbytes for batch in self._batches)

    def column(self, name: str) -> pa.ChunkedArray:
        """A field of all rows as Arrow stores it, without making rows; `SCHEMA` names the fields and their types."""
        self._flush()
        return pa.chunked_array([batch.column(name) for batch in self._batches], type=SCHEMA.field(name).type)

    def select(self, positions: np.ndarray | Sequence[int]) -> "RowView":
        """The rows at these positions (from 0), in this order, repeats allowed. Raises IndexError for another."""
        self._flush()
        return RowView(self, _checked(positions, len(self)))

    def __len__(self) -> int:
        return self._stored + len(self._pending)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "RowView": ...
    def __getitem__(self, index: int | slice) -> "Row | RowView":
        if isinstance(index, slice):
            return self.select(np.arange(len(self), dtype=np.int64)[index])
        place = range(len(self))[index]
        if place >= self._stored:
            return self._pending[place - self._stored]
        number = bisect_right(self._starts, place) - 1
        return next(rows_of(self._batches[number].slice(place - self._starts[number], 1)))

    def __iter__(self) -> Iterator[Row]:
        self._flush()
        for batch in list(self._batches):
            yield from rows_of(batch)

    def rows_at(self, positions: np.ndarray) -> list[Row]:
        """The rows at these positions, in this order; each batch is visited once."""
        return list(rows_of(self.batch_at(positions)))

    def batch_at(self, positions: np.ndarray) -> pa.RecordBatch:
        """The same in Arrow, in the columns of SCHEMA; for no more rows than may be held twice."""
        self._flush()
        numbers = np.searchsorted(np.asarray(self._starts, dtype=np.int64), positions, side="right") - 1
        parts, places = [], [np.empty(0, np.int64)]
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            parts.append(self._batches[number].take(pa.array(positions[here] - self._starts[number])))
            places.append(here)
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate(places), kind="stable")
        together = pa.Table.from_batches(parts, SCHEMA).unify_dictionaries().combine_chunks()
        return pa.RecordBatch.from_struct_array(together.to_struct_array().combine_chunks()).take(pa.array(order))

    def _flush(self) -> None:
        if self._pending:
            rows, self._pending, self._pending_chars = self._pending, [], 0
            self._add(_batch_of(rows))

    def _add(self, batch: pa.RecordBatch) -> None:
        self._starts.append(self._stored)
        self._batches.append(batch)
        self._stored += batch.num_rows


class RowView(Sequence[Row]):
    """Chosen rows of a store in a chosen order; made by `RowStore.select`. It holds 8 bytes a row."""

    def __init__(self, store: RowStore, positions: np.ndarray) -> None:
        self._store = store
        self._positions = positions

    def column(self, name: str) -> pa.ChunkedArray:
        """A field of the rows as `RowStore.column` gives it, in the view's order."""
        return self._store.column(name).take(pa.array(self._positions))

    @property
    def positions(self) -> np.ndarray:
        """Where the rows are in the store, int64."""
        return self._positions

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in their order, some at a time, in the columns of SCHEMA."""
        for start in range(0, len(self), BATCH_ROWS):
            yield self._store.batch_at(self._positions[start : start + BATCH_ROWS])

    def batch(self) -> pa.RecordBatch:
        """All rows in Arrow, in the columns of SCHEMA; for no more rows than may be held twice."""
        return self._store.batch_at(self._positions)

    def select(self, positions: np.ndarray | Sequence[int]) -> "RowView":
        """The rows at these positions of this view, in this order. Raises IndexError for a position it has not."""
        return RowView(self._store, self._positions[_checked(positions, len(self))])

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "RowView": ...
    def __getitem__(self, index: int | slice) -> "Row | RowView":
        if isinstance(index, slice):
            return RowView(self._store, self._positions[index])
        return self._store[int(self._positions[range(len(self))[index]])]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BATCH_ROWS):
            yield from self._store.rows_at(self._positions[start : start + BATCH_ROWS])


def _checked(positions: np.ndarray | Sequence[int], length: int) -> np.ndarray:
    chosen = np.asarray(positions)
    if chosen.size and chosen.dtype.kind not in "iu":
        raise IndexError(f"positions must be whole numbers, not {chosen.dtype}")
    chosen = chosen.astype(np.int64)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= length):
        raise IndexError(f"positions from {chosen.min()} to {chosen.max()} do not fit into {length} rows")
    return chosen


def _batch_of(rows: Sequence[Row]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        "turns": [bytes(_CODES[message.role, message.train] for message in row.messages) for row in rows],
        "contents": [[message.content for message in row.messages] for row in rows],
    }
    for name in SCHEMA.names:
        columns.setdefault(name, [getattr(row, name, None) for row in rows])
    try:
        arrays = [_array_of(columns[field.name], field.type) for field in SCHEMA]
    except (UnicodeEncodeError, pa.ArrowException) as error:
        raise DataError(
            f"rows of {rows[0].source} from line {rows[0].line} on cannot be stored: {error}. Mend the text there"
        ) from error
    return pa.record_batch(arrays, schema=SCHEMA)


def _array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    # Arrow's usual pool keeps what its builders let go of: half as much again as the rows themselves.
    pool = pa.system_memory_pool()
    if kind == _REPEATED:
        return pc.call_function(
            "dictionary_encode", [pa.array(values, pa.string(), memory_pool=pool)], memory_pool=pool
        )
    return pa.array(values, kind, memory_pool=pool)


def rows_of(batch: pa.RecordBatch) -> Iterator[Row]:
    """The rows of a batch in the columns of SCHEMA, one by one."""
    fields = {name: _values_of(batch.column(name)) for name in SCHEMA.names}
    turns, contents = fields.pop("turns"), fields.pop("contents")
    messages = map(_messages_of, turns, contents)
    fields["group_keys"] = map(tuple, fields["group_keys"])
    others = [fields[name] for name in ROW_FIELDS]
    for row_id, said, *rest in zip(fields["id"], messages, *others, strict=False):
        yield Row(row_id, said, *rest)


def _messages_of(turns: bytes, contents: list[str]) -> tuple[Message, ...]:
    return tuple(
        Message(role, text, train) for (role, train), text in zip(map(_TURNS.__getitem__, turns), contents, strict=True)
    )


def _values_of(array: pa.Array) -> Iterable[Any]:
    if array.null_count == len(array):
        return repeat(None, len(array))
    if isinstance(array, pa.DictionaryArray):
        words = [*array.dictionary.to_pylist(), None]
        return map(words.__getitem__, array.indices.fill_null(len(words) - 1).to_pylist())
    return array.to_pylist()
