"""The columns of written rows from rows and tokens in Arrow, without making one Python object a row.

It gives what `tables.row_columns` gives for the same rows, which is how rows are written that were encoded just now.
Knows nothing of caches or files.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from qlora_core.data.row_store import ROLES, TRAINED
from qlora_core.data.tables import ROW_SCHEMA

# Of a trained turn in the `turns` of an encoding: its message, its first token, its stop token, its prompt's length.
TURN_NUMBERS = 4
_PLAIN = ("id", "source", "line", "category", "rejected", "tools", "licence", "generator", "language")


def encoded_columns(rows: pa.RecordBatch, encodings: pa.Table) -> pa.Table:
    """A table of ROW_SCHEMA, a line for each of `rows` (`row_store.SCHEMA`) with its line of `encodings`.

    `encodings` has the columns of `encodings.ENCODING_SCHEMA`. The tokens of rejected answers are null: no preference
    pair may be among the rows. No rows give an empty table.
    """
    offsets, texts = _list(rows.column("contents"))
    codes = np.frombuffer(b"".join(rows.column("turns").to_pylist()), np.uint8)
    ids_at, ids = _list(encodings.column("input_ids").combine_chunks())
    turns_at, numbers = _list(encodings.column("turns").combine_chunks())
    turns = numbers.to_numpy(zero_copy_only=False).reshape(-1, TURN_NUMBERS).astype(np.int64)
    turns_at = turns_at // TURN_NUMBERS
    # A row has at least one trained turn
    answers = offsets[:-1] + turns[turns_at[1:] - 1, 0] if len(rows) else offsets[:0]
    roles = pa.DictionaryArray.from_arrays(pa.array(codes & ~np.uint8(TRAINED), pa.int8()), pa.array(ROLES))
    messages = pa.StructArray.from_arrays([roles.cast(pa.string()), texts], names=["role", "content"])
    keys_at, keys = _list(rows.column("group_keys"))
    columns: dict[str, Any] = {name: rows.column(name) for name in _PLAIN}
    columns |= {
        "messages": _list_of(offsets, messages),
        "train": _list_of(offsets, pa.array((codes & TRAINED) > 0)),
        "prompt": encodings.column("prompt").combine_chunks(),
        "reference": texts.take(pa.array(answers)),
        "input_ids": _list_of(ids_at, ids),
        "loss_mask": _list_of(ids_at, pa.array(_mask(ids_at, turns_at, turns))),
        "tokens": pa.array(np.diff(ids_at), pa.int32()),
        "group_keys": _list_of(keys_at, keys),
    }
    arrays = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(len(rows), field.type)
        for field in ROW_SCHEMA
    ]
    return pa.table(arrays, schema=ROW_SCHEMA)


def _mask(ids_at: np.ndarray, turns_at: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Bool, a value a token: within a trained turn, its stop token too."""
    first = np.repeat(ids_at[:-1], np.diff(turns_at)).astype(np.int64)
    edges = np.zeros(int(ids_at[-1]) + 1, np.int32)
    np.add.at(edges, first + turns[:, 1], 1)
    np.add.at(edges, first + turns[:, 2] + 1, -1)
    return np.cumsum(edges[:-1]) > 0


def _list(array: pa.ListArray) -> tuple[np.ndarray, pa.Array]:
    """Where each list starts and the last one ends (int32), from 0, and all their values."""
    offsets = array.offsets.to_numpy()
    return offsets - offsets[0], array.flatten()


def _list_of(offsets: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
