"""Exact de-duplication: rows that say the same, spacing aside, keep one survivor. Also fixes who survives."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from qlora_core.data.ledger import Dropped
from qlora_core.data.row import Row
from qlora_core.data.split import Side
from qlora_core.data.text_form import spaced

# White space to `str.split`, so no spaced text holds it.
SEPARATOR = "\x1f"
ID_BYTES = 64
NO_FIELDS = (None, None, None, None, None, ())


def drop_duplicates(
    rows: Sequence[Row], source_order: Mapping[str, int], earlier: Mapping[Side, pa.Array] | None = None
) -> tuple[np.ndarray, list[Dropped]]:
    """One row of every group that says the same, and the others with the id of the one kept.

    Two rows say the same if their `conversation_key` is equal, their tools are, and the rejected answer of a preference
    pair too; they are compared by 128-bit hashes. Equal prompts with other answers are not duplicates. Returns the
    positions (int64) in `rows` of the survivors, best first by `Survival`'s order, so that shuffling the lines of a
    file changes nothing that is kept. `earlier` (ids by side, see `placement.read_earlier`) names the rows of a set
    curated before, which survive new ones. `rows` is gone through once; no rows give no positions.
    """
    survival = Survival(len(rows), source_order, earlier)
    keys = np.zeros((2, len(rows)), np.uint64)
    for place, row in enumerate(rows):
        survival.add(place, row)
        digest = xxhash.xxh3_128_intdigest(_key(row))
        keys[:, place] = digest >> 64, digest & 0xFFFF_FFFF_FFFF_FFFF
    order = survival.order()
    high, low = keys[:, order]
    grouped = np.lexsort((low, high))
    first = np.ones(len(rows), bool)
    first[1:] = (high[grouped][1:] != high[grouped][:-1]) | (low[grouped][1:] != low[grouped][:-1])
    survivor = np.empty(len(rows), np.int64)
    survivor[grouped] = grouped[first][np.cumsum(first) - 1]
    kept = survivor == np.arange(len(rows))
    dropped = [
        survival.dropped(int(order[rank]), "duplicate", int(order[survivor[rank]])) for rank in np.flatnonzero(~kept)
    ]
    return order[kept], dropped


class Survival:
    """Which of two like rows survives, kept in about 100 bytes a row.

    A row whose id is among `earlier` (ids by side, of a set curated before) comes before every other. Then the row from
    the first source is first, then the one of lowest id, then by category and the other fields, then by line: only rows
    that are the same in all they say are told apart by where they lie in a file.
    """

    def __init__(
        self, rows: int, source_order: Mapping[str, int], earlier: Mapping[Side, pa.Array] | None = None
    ) -> None:
        self._source_order = source_order
        self._earlier = earlier or {}
        self._sources: dict[str, int] = {}
        self._categories: dict[str, int] = {}
        self._source = np.zeros(rows, np.int32)
        self._category = np.zeros(rows, np.int32)
        self._id = np.zeros(rows, f"S{ID_BYTES}")
        self._fields = np.zeros(rows, np.uint64)
        self._line = np.zeros(rows, np.int64)

    def add(self, place: int, row: Row) -> None:
        """Note the row at a position; every position is noted once before `order` is asked for."""
        self._source[place] = self._sources.setdefault(row.source, len(self._sources))
        self._category[place] = self._categories.setdefault(row.category or "", len(self._categories))
        self._id[place] = row.id.encode()
        fields = (row.licence, row.generator, row.language, row.tools, row.rejected, row.group_keys)
        if fields != NO_FIELDS:
            self._fields[place] = xxhash.xxh3_64_intdigest(repr(fields).encode("utf-8", "surrogatepass"))
        self._line[place] = row.line

    def order(self) -> np.ndarray:
        """Positions (int64), the best first. Raises KeyError for a source that `source_order` does not name."""
        source = np.array([self._source_order[name] for name in self._sources], np.int64)
        category = np.argsort(np.argsort(np.array(list(self._categories), object)))
        keys = [self._line, self._fields, category[self._category], self._id, source[self._source]]
        keys += [~self._is_earlier()] if self._earlier else []
        return np.lexsort(keys).astype(np.int64) if len(self._line) else np.zeros(0, np.int64)

    def id(self, place: int) -> str:
        """The id of the row at a position."""
        return self._id[place].decode()

    def source(self, place: int) -> str:
        """The source of the row at a position."""
        return list(self._sources)[self._source[place]]

    def dropped(self, place: int, rule: str, survivor: int, score: float | None = None) -> Dropped:
        """The ledger's line for the row at a position, which matched the row at another."""
        line = int(self._line[place])
        return Dropped(self.id(place), self.source(place), line, rule, matched_id=self.id(survivor), score=score)

    def _is_earlier(self) -> np.ndarray:
        """True for each position whose id is that of an earlier row."""
        kind = pa.large_string()
        shape = (pa.binary(ID_BYTES), len(self._id), [None, pa.py_buffer(self._id)])
        ids = pa.FixedSizeBinaryArray.from_buffers(*shape).cast(pa.large_binary()).cast(kind)
        known = pa.chunked_array([old.cast(kind) for old in self._earlier.values()], kind).combine_chunks()
        found = pc.call_function("is_in", [ids], pc.SetLookupOptions(value_set=known))
        return found.to_numpy(zero_copy_only=False)


def _key(row: Row) -> bytes:
    parts = [part for turn in row.conversation_key for part in turn]
    if row.rejected is not None:
        parts += ["rejected", spaced(row.rejected)]
    if row.tools is not None:
        # Last, because tools are compared as they are and might hold the separator.
        parts += ["tools", row.tools]
    return SEPARATOR.join(parts).encode("utf-8", "surrogatepass")
