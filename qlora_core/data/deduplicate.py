"""Exact de-duplication: rows that say the same, spacing aside, keep one survivor. Also fixes who survives."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from qlora_core.data.ledger import Dropped
from qlora_core.data.row import Row
from qlora_core.data.row_store import RowStore, RowView
from qlora_core.data.split import Side
from qlora_core.data.tags.cache import TagCache
from qlora_core.data.tags.run import tag_rows
from qlora_core.data.tags.tagger import Tagged, fingerprint_of
from qlora_core.data.text_form import UNICODE_VERSION, spaced

# White space to `str.split`, so no spaced text holds it.
SEPARATOR = "\x1f"
ID_BYTES = 64
ID_CHUNK = 4096
FIELDS = ("licence", "generator", "language", "tools", "rejected")
# Raise it whenever rows that were told apart would no longer be, or the other way round.
SAME_TEXT_VERSION = 1
HASH_BYTES = 16


def drop_duplicates(
    rows: Sequence[Row],
    source_order: Mapping[str, int],
    earlier: Mapping[Side, pa.Array] | None = None,
    cache: TagCache | None = None,
) -> tuple[np.ndarray, list[Dropped]]:
    """One row of every group that says the same, and the others with the id of the one kept.

    Two rows say the same if their `conversation_key` is equal, their tools are, and the rejected answer of a preference
    pair too; they are compared by 128-bit hashes. Equal prompts with other answers are not duplicates. Returns the
    positions (int64) in `rows` of the survivors, best first by `Survival`'s order, so that shuffling the lines of a
    file changes nothing that is kept. `earlier` (ids by side, see `placement.read_earlier`) names the rows of a set
    curated before, which survive new ones. With a `cache`, the hashes of rows seen before are taken from it. No rows
    give no positions.
    """
    survival = Survival(rows, source_order, earlier)
    hashes = tag_rows(rows, [SameTextTagger()], cache).table.column("same_text").combine_chunks()
    keys = fixed_bytes(hashes).view(np.uint64).reshape(-1, 2).T
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


class SameTextTagger:
    """Column `same_text`: 16 bytes that are equal for rows that say the same."""

    name = "same_text"
    cached = True
    schema = pa.schema([pa.field("same_text", pa.binary(HASH_BYTES))])
    fingerprint = fingerprint_of(name, SAME_TEXT_VERSION, schema, {"unicode": UNICODE_VERSION})

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """Hash the rows one by one."""
        values = [xxhash.xxh3_128_digest(_key(row)) for row in rows]
        return Tagged(
            pa.table([pa.array(values, pa.binary(HASH_BYTES))], schema=self.schema), np.zeros(len(rows), bool)
        )


def fixed_bytes(array: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The values, none of which is null, as bytes: uint8, (rows, width)."""
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


class Survival:
    """Which of two like rows survives, kept in about 100 bytes a row.

    A row whose id is among `earlier` (ids by side, of a set curated before) comes before every other. Then the row from
    the first source is first, then the one of lowest id, then by category and the other fields, then by line: only rows
    that are the same in all they say are told apart by where they lie in a file.
    """

    def __init__(
        self, rows: Sequence[Row], source_order: Mapping[str, int], earlier: Mapping[Side, pa.Array] | None = None
    ) -> None:
        self._source_order = source_order
        self._earlier = earlier or {}
        store = rows if isinstance(rows, RowStore | RowView) else RowStore(rows)
        self._sources, self._source = _numbered(store.column("source"))
        self._categories, self._category = _numbered(store.column("category"))
        self._id = _fixed(store.column("id"))
        self._line = store.column("line").to_numpy()
        self._fields = _hash_fields(store)

    def order(self) -> np.ndarray:
        """Positions (int64), the best first. Raises KeyError for a source that `source_order` does not name."""
        source = np.array([self._source_order[name] for name in self._sources], np.int64)
        category = np.argsort(np.argsort(np.array(self._categories, object)))
        keys = [self._line, self._fields, category[self._category], self._id, source[self._source]]
        keys += [~self._is_earlier()] if self._earlier else []
        return np.lexsort(keys).astype(np.int64) if len(self._line) else np.zeros(0, np.int64)

    def id(self, place: int) -> str:
        """The id of the row at a position."""
        return self._id[place].decode()

    def source(self, place: int) -> str:
        """The source of the row at a position."""
        return self._sources[self._source[place]]

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


def _fixed(texts: pa.ChunkedArray) -> np.ndarray:
    """The ids as bytes of one width; as Python texts, which take three times as much, only some at a time."""
    fixed = np.empty(len(texts), f"S{ID_BYTES}")
    for start in range(0, len(texts), ID_CHUNK):
        fixed[start : start + ID_CHUNK] = texts.slice(start, ID_CHUNK).to_pylist()
    return fixed


def _numbered(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The distinct texts, none taken for an empty one, and each row's place among them."""
    texts = column.cast(pa.string()).fill_null("").combine_chunks()
    coded = texts.dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy()


def _hash_fields(rows: RowStore | RowView) -> np.ndarray:
    """A hash of what a row says beside its messages, 0 where that is nothing."""
    columns = [rows.column(name) for name in FIELDS]
    keys = rows.column("group_keys")
    says = pc.call_function("greater", [pc.call_function("list_value_length", [keys]), pa.scalar(0)])
    for column in columns:
        says = pc.call_function("or", [says, column.is_valid()])
    places = np.flatnonzero(says.to_numpy())
    hashes = np.zeros(len(rows), np.uint64)
    taken = [column.take(pa.array(places)).to_pylist() for column in (*columns, keys)]
    for place, *fields, group_keys in zip(places.tolist(), *taken, strict=True):
        said = repr((*fields, tuple(group_keys))).encode("utf-8", "surrogatepass")
        hashes[place] = xxhash.xxh3_64_intdigest(said)
    return hashes


def _key(row: Row) -> bytes:
    parts = [part for turn in row.conversation_key for part in turn]
    if row.rejected is not None:
        parts += ["rejected", spaced(row.rejected)]
    if row.tools is not None:
        # Last, because tools are compared as they are and might hold the separator.
        parts += ["tools", row.tools]
    return SEPARATOR.join(parts).encode("utf-8", "surrogatepass")
