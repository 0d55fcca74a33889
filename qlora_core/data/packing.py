"""Which training rows share a sequence: best-fit decreasing over whole rows, and the file that says so.

Knows lengths and ids only: what keeps the rows of a sequence apart is `model/packed_attention.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qlora_core.errors import DataError

PACKS_FILE = "packs.parquet"
PACKS_SCHEMA = pa.schema(
    [
        pa.field("pack", pa.int64(), nullable=False),
        pa.field("row_ids", pa.list_(pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Packs:
    """Rows by sequence: sequence k holds the rows at positions `order[starts[k] : starts[k + 1]]`, in that order.

    `order` has shape [rows packed], `starts` [sequences + 1]; `tokens` is the length that no sequence exceeds.
    """

    tokens: int
    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def sequence_tokens(tokens: int | None, window: int) -> int:
    """The length of a packed sequence: `tokens` (`data.packing.tokens`), or where it is None a row's `window`.

    Raises:
        DataError: a row of `window` tokens would not fit, and rows are never cut to fit.
    """
    if tokens is None:
        return window
    if tokens < window:
        raise DataError(
            f"data.packing.tokens is {tokens}, but a row may have {window} tokens (data.max_tokens) and is never cut "
            f"to fit a sequence; set data.packing.tokens to at least {window}, or lower data.max_tokens"
        )
    return tokens


def pack_rows(ids: Sequence[str] | pa.StringArray, lengths: np.ndarray, trained: np.ndarray, tokens: int) -> Packs:
    """Put whole rows into few sequences of at most `tokens` tokens; each row that trains anything lies in exactly one.

    `lengths` and `trained` [rows] count a row's tokens and those that carry loss after its first; a row with none of
    these is in no sequence. Rows are taken from long to short, equal ones by id, and each goes where it leaves the
    least room: best-fit decreasing, which opens at most 11/9 of the fewest possible sequences, plus 4 (Johnson et al.
    1974). The result does not depend on the order of the rows. No rows give no sequences.

    Raises:
        DataError: a row is longer than a sequence; the message names it.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = pa.table({"length": lengths, "id": pa.array(ids, pa.string())})
    long_first = pc.SortOptions([("length", "descending"), ("id", "ascending")])
    order = pc.call_function("sort_indices", [rows], long_first).to_numpy().astype(np.int64)
    order = order[np.asarray(trained)[order] > 0]
    if len(order) and lengths[order[0]] > tokens:
        raise DataError(
            f"row {ids[int(order[0])]} has {lengths[order[0]]} tokens, but a packed sequence takes {tokens}; set "
            f"data.packing.tokens to at least {lengths[order[0]]}, or lower data.max_tokens"
        )
    sequence_of = _best_fit(lengths[order].tolist(), tokens)
    counts = np.bincount(sequence_of) if len(order) else np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # Stable: inside a sequence, rows stay in the order in which they were placed
    return Packs(tokens, order[np.argsort(sequence_of, kind="stable")], starts)


def _best_fit(lengths: Sequence[int], tokens: int) -> np.ndarray:
    """The sequence of each row, given from long to short; sequences are numbered as they are opened."""
    by_space: list[list[int]] = [[] for _ in range(tokens + 1)]
    spaces = 0  # Bit s is set while some sequence has room for exactly s more tokens
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    for place, length in enumerate(lengths):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, sequence = tokens, opened
            opened += 1
        sequence_of[place] = sequence
        by_space[space - length].append(sequence)
        spaces |= 1 << (space - length)
    return sequence_of


def packing_summary(packs: Packs, lengths: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
    """What packing achieved, as JSON data for the card; counts take the packed rows alone.

    `fill` is the share of the sequences' places that hold a token, `fill_unpacked` what it would be with one row a
    sequence, `trained_share` the share of the tokens that carry loss. Shares of nothing are 0.
    """
    used = int(np.asarray(lengths)[packs.order].sum())
    labels = int(np.asarray(trained)[packs.order].sum())
    rows, sequences = len(packs.order), len(packs)
    return {
        "sequence_tokens": packs.tokens,
        "sequences": sequences,
        "rows": rows,
        "most_rows": int(np.diff(packs.starts).max(initial=0)),
        "tokens": used,
        "trained_tokens": labels,
        "fill": _share(used, sequences * packs.tokens),
        "fill_unpacked": _share(used, rows * packs.tokens),
        "trained_share": _share(labels, used),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def write_packs(path: Path, packs: Packs, ids: Sequence[str] | pa.StringArray) -> None:
    """Write `path` (`packs.parquet` of a curated folder): a line per sequence, its number and its rows' ids in order.

    `ids` are those that `pack_rows` was given.
    """
    placed = pa.array(ids, pa.string()).take(pa.array(packs.order))
    row_ids = pa.ListArray.from_arrays(pa.array(packs.starts.astype(np.int32)), placed)
    table = pa.table({"pack": np.arange(len(packs), dtype=np.int64), "row_ids": row_ids}, schema=PACKS_SCHEMA)
    pq.write_table(table, path, compression="zstd")


def read_packs(folder: Path) -> list[list[str]] | None:
    """The row ids of every sequence of a curated folder; None where its rows were not packed.

    Raises:
        DataError: the file is there and is none that `write_packs` wrote.
    """
    path = folder / PACKS_FILE
    if not path.exists():
        return None
    try:
        return pq.read_table(path, schema=PACKS_SCHEMA).column("row_ids").to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _not_packs(path, error) from error


def count_packs(folder: Path) -> int | None:
    """How many sequences a curated folder lists; None where its rows were not packed. Raises as `read_packs` does."""
    path = folder / PACKS_FILE
    if not path.exists():
        return None
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise _not_packs(path, error) from error


def _not_packs(path: Path, error: Exception) -> DataError:
    return DataError(f"{str(path)!r} is no list of packed rows: {error}. Curate the data again")
