"""What a tagger is, and by which key a row's tags are found again. Knows no tagger, and nothing of caches.

A tagger only adds columns. What it cannot measure is null, never 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qlora_core.data.row import Row
from qlora_core.data.row_store import RowStore, RowView
from qlora_core.digest import digest_json

KEY_BYTES = 16
KEY_TYPE = np.dtype(f"S{KEY_BYTES}")
_KEYS_AT_ONCE = 16_384


@dataclass(frozen=True, slots=True)
class Tagged:
    """The tags of a batch: a table of the tagger's schema, a line a row; `failed` (bool, b rows) marks failures.

    A failed row holds nulls, is counted, and is tried again by the next run. A null of a row that did not fail says
    that there was nothing to measure: an answer of one word has no repetition.
    """

    table: pa.Table
    failed: np.ndarray


class Tagger(Protocol):
    """Adds columns to rows, batch by batch.

    `fingerprint` (64 hex digits) stands for everything that may change its result: name, version, settings, columns.
    `cached` says that a row's tags depend on nothing but its key (see `tag_key`), so that they may be kept by it.
    """

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """The digest of all that can change a tag."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        ...

    @property
    def cached(self) -> bool:
        """Whether its tags are worth keeping and depend on the row's key alone."""
        ...

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """The tags of a batch, aligned with it; an empty batch gives an empty table."""
        ...


@runtime_checkable
class LabelTagger(Tagger, Protocol):
    """A tagger that looks at nothing of a row but these of its fields, texts or None each, which few rows have for
    themselves: rows that agree in them are tagged once.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the fields."""
        ...


def fingerprint_of(name: str, version: int, schema: pa.Schema, settings: Any) -> str:
    """SHA-256 over a tagger's name, version, columns and settings (plain JSON data), 64 hex digits."""
    columns = [[field.name, str(field.type)] for field in schema]
    return digest_json({"name": name, "version": version, "columns": columns, "settings": settings})


def tag_key(row: Row) -> bytes:
    """16 bytes that stand for all of a row's text: the first half of its id."""
    return bytes.fromhex(row.id[: 2 * KEY_BYTES])


def tag_keys(rows: Sequence[Row]) -> np.ndarray:
    """The `tag_key` of every row, S16, in their order; rows in Arrow are not made for it."""
    if not isinstance(rows, RowStore | RowView):
        return np.array([tag_key(row) for row in rows], KEY_TYPE)
    data = bytearray()
    for chunk in rows.column("id").chunks:
        for start in range(0, len(chunk), _KEYS_AT_ONCE):
            halves = pc.call_function(
                "utf8_slice_codeunits",
                [chunk.slice(start, _KEYS_AT_ONCE)],
                pc.SliceOptions(0, 2 * KEY_BYTES),
            )
            data += bytes.fromhex("".join(halves.to_pylist()))
    return np.frombuffer(bytes(data), KEY_TYPE)


def texts_of(row: Row) -> Iterator[str]:
    """What of a row may end up in training, and what its id covers: its turns, a rejected answer, the tools."""
    for message in row.messages:
        yield message.content
    if row.rejected is not None:
        yield row.rejected
    if row.tools is not None:
        yield row.tools


def tagged(schema: pa.Schema, columns: Sequence[Sequence[Any]], failed: Sequence[bool] | None = None) -> Tagged:
    """`columns`, in the order of the schema, as a batch's tags; without `failed` none did."""
    arrays = [pa.array(values, type=field.type) for values, field in zip(columns, schema, strict=True)]
    rows = len(arrays[0])
    return Tagged(
        pa.Table.from_arrays(arrays, schema=schema),
        np.zeros(rows, dtype=bool) if failed is None else np.asarray(failed, dtype=bool),
    )
