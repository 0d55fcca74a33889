"""Of every row what the search for candidates needs: the hash of each band, a fingerprint, a size.

What a row's text alone decides is kept from run to run. Preambles are learnt from all rows, so that few new rows may
change them; what is kept for rows that no preamble could touch does not depend on them. Compares nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from qlora_core.config.curation import NearDuplicatesConfig
from qlora_core.data.deduplicate import fixed_bytes
from qlora_core.data.near_duplicates import kernels
from qlora_core.data.near_duplicates.shingles import Shingles, shingle
from qlora_core.data.near_duplicates.signatures import Banding, hash_bands, sign
from qlora_core.data.positions import rows_at
from qlora_core.data.row import Row
from qlora_core.data.row_store import ROLES, TRAINED, RowStore, RowView
from qlora_core.data.tags.cache import TagCache
from qlora_core.data.tags.run import tag_rows
from qlora_core.data.tags.tagger import Tagged, fingerprint_of
from qlora_core.data.text_form import UNICODE_VERSION
from qlora_core.data.wrappers import MIN_CHARACTERS, WRAPPER_OPENINGS, Preambles, strip_wrappers
from qlora_core.digest import digest_json

# Raise it whenever the bands, the fingerprint or the size of the same row would be others.
SCAN_VERSION = 1
BATCH_ROWS = 1024
BATCH_CHARACTERS = 1 << 20
BAND = np.dtype("<u4")
NO_PREAMBLES = Preambles()


@dataclass(frozen=True, slots=True)
class Scan:
    """Of every position: the hash of each band (bands, rows), a fingerprint of all shingles, how many they are."""

    bands: np.ndarray
    fingerprints: np.ndarray
    sizes: np.ndarray


def scan_rows(
    rows: Sequence[Row],
    config: NearDuplicatesConfig,
    banding: Banding,
    preambles: Preambles,
    cache: TagCache | None = None,
    by_content: np.ndarray | None = None,
) -> Scan:
    """Scan all rows, or take from `cache` what an earlier run found for the same text.

    `by_content` (bool, a value a row; None: all) is False for rows whose id is not that of their text, as it is for
    those that were cut: they are neither looked up nor kept.
    """
    scan = Scan(
        np.empty((banding.bands, len(rows)), np.uint32), np.empty(len(rows), np.uint64), np.empty(len(rows), np.int32)
    )
    touched = may_be_stripped(rows, preambles)
    sure = np.ones(len(rows), bool) if by_content is None else by_content
    groups = ((~touched & sure, NO_PREAMBLES, cache), (touched & sure, preambles, cache), (~sure, preambles, None))
    for chosen, known, shelf in groups:
        places = np.flatnonzero(chosen)
        some = rows_at(rows, places)
        tagger = _ScanTagger(config, banding, known)
        found = tag_rows(some if isinstance(some, RowView) else list(some), [tagger], shelf).table
        start = 0
        for batch in found.to_batches():  # one at a time: all bands twice would be felt
            here = places[start : start + len(batch)]
            scan.bands[:, here] = fixed_bytes(batch.column("bands")).view(BAND).reshape(len(here), banding.bands).T
            scan.fingerprints[here] = batch.column("fingerprint").to_numpy()
            scan.sizes[here] = batch.column("shingles").to_numpy()
            start += len(batch)
    return scan


def text_of(row: Row, preambles: Preambles) -> str:
    """What of a row is compared: its turns, a line each, without what it shares with rows of another content.

    Tools are not in it: `drop_near_duplicates` compares rows of the same tools only.
    """
    parts = []
    for message in row.messages:
        if message.role == "system":
            parts.append(preambles.strip_system(message.content))
        elif message.role == "user":
            parts.append(preambles.strip(strip_wrappers(message.content)))
        else:
            parts.append(message.content)
    return "\n".join([*parts, row.rejected or ""])


def may_be_stripped(rows: Sequence[Row], preambles: Preambles) -> np.ndarray:
    """False (bool, a value a row) where `text_of` gives the same with these preambles and with none.

    True is said of all rows with a system turn or a wrapped prompt, and of all that are not in Arrow.
    """
    if not preambles.texts and not preambles.systems:
        return np.zeros(len(rows), bool)
    if not isinstance(rows, RowStore | RowView):
        return np.ones(len(rows), bool)
    heads = pc.SetLookupOptions(pa.array([text[:MIN_CHARACTERS] for text in preambles.texts], pa.string()))
    flags = [np.zeros(0, bool)]
    for batch in rows.batches():
        contents = batch.column("contents")
        texts, starts = contents.flatten(), contents.offsets.to_numpy()
        roles = np.frombuffer(b"".join(batch.column("turns").to_pylist()), np.uint8) & ~np.uint8(TRAINED)
        opening = pc.call_function("utf8_slice_codeunits", [texts], pc.SliceOptions(0, MIN_CHARACTERS))
        may = _true(pc.call_function("is_in", [opening], heads))
        bare = pc.call_function("utf8_ltrim_whitespace", [texts])
        for wrapper in WRAPPER_OPENINGS:
            may |= _true(pc.call_function("starts_with", [bare], pc.MatchSubstringOptions(wrapper)))
        may = (may & (roles == ROLES.index("user"))) | (roles == ROLES.index("system"))
        flags.append(np.logical_or.reduceat(may, starts[:-1] - starts[0]))
    return np.concatenate(flags)


def text_batches(rows: Iterable[Row], preambles: Preambles) -> Iterator[tuple[list[str], list[int]]]:
    """What is compared of each row and a hash of its tools (0 for none), in batches bounded by rows and characters."""
    texts: list[str] = []
    tools: list[int] = []
    characters = 0
    for row in rows:
        texts.append(text_of(row, preambles))
        tools.append(0 if row.tools is None else xxhash.xxh3_64_intdigest(row.tools.encode("utf-8", "surrogatepass")))
        characters += len(texts[-1])
        if len(texts) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield texts, tools
            texts, tools, characters = [], [], 0
    if texts:
        yield texts, tools


def told_apart(shingles: Shingles, tools: Sequence[int]) -> Shingles:
    """Each text's shingles, hashed anew with its tools' hash: those of the same words under other tools differ.

    Similarity under the same tools stays as it is. With tools, each text's hashes come back in ascending order.
    """
    if not any(tools):
        return shingles
    lengths = np.diff(shingles.offsets)
    hashes = shingles.hashes ^ np.repeat(np.array(tools, np.uint64), lengths)
    return Shingles(hashes[np.lexsort((hashes, np.repeat(np.arange(len(tools)), lengths)))], shingles.offsets)


class _ScanTagger:
    """Columns `bands` (32 bits a band), `fingerprint`, `shingles`; under the given settings and preambles."""

    name = "near_duplicates"
    cached = True

    def __init__(self, config: NearDuplicatesConfig, banding: Banding, preambles: Preambles) -> None:
        self._config, self._banding, self._preambles = config, banding, preambles
        width = BAND.itemsize * banding.bands
        self.schema = pa.schema([("bands", pa.binary(width)), ("fingerprint", pa.uint64()), ("shingles", pa.int32())])
        settings = {
            "words": config.shingle_words,
            "permutations": config.permutations,
            "seed": config.seed,
            "rows": banding.rows,
            "preambles": digest_json([list(preambles.texts), sorted(preambles.systems)]),
            "versions": [version("rensa"), UNICODE_VERSION],
        }
        self.fingerprint = fingerprint_of(self.name, SCAN_VERSION, self.schema, settings)

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """Shingle, sign and band the rows."""
        parts = [self._scan(texts, tools) for texts, tools in text_batches(rows, self._preambles)]
        table = pa.concat_tables([self.schema.empty_table(), *parts])
        return Tagged(table, np.zeros(len(rows), bool))

    def _scan(self, texts: Sequence[str], tools: Sequence[int]) -> pa.Table:
        config = self._config
        shingles = told_apart(shingle(texts, config.shingle_words), tools)
        bands = hash_bands(sign(shingles, config.permutations, config.seed), self._banding)
        data = pa.py_buffer(np.ascontiguousarray(bands.T, dtype=BAND))
        fingerprints = np.empty(len(texts), np.uint64)
        kernels.add_up(shingles.hashes, shingles.offsets, fingerprints)
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(self.schema.field("bands").type, len(texts), [None, data]),
            pa.array(fingerprints),
            pa.array(np.diff(shingles.offsets), pa.int32()),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)


def _true(flags: pa.Array) -> np.ndarray:
    return flags.to_numpy(zero_copy_only=False).copy()
