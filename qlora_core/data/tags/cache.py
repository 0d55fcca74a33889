"""Tags kept from run to run, by the tagger's fingerprint and the row's key. Knows no tagger and no row.

They lie in *segments*: Parquet files, sorted by key, named by the SHA-256 of their bytes and never changed. A segment
that is damaged is a miss that says so. Small segments are merged into one once there are many: first the merged one is
written, then the others go, so that whoever reads at that moment finds each tag in the one or the other, or tags anew.
"""

import logging
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.tags.tagger import KEY_BYTES, KEY_TYPE
from qlora_core.digest import digest_bytes
from qlora_core.errors import StoreError

logger = logging.getLogger(__name__)

SUFFIX = ".parquet"
_KEY_COLUMN = "row_key"
_MANY_SEGMENTS = 8
_SMALL_BYTES = 8 << 20
_LOOKS = 3


class SegmentShelf(Protocol):
    """Where segments lie: small files by a tagger's fingerprint and a name."""

    @property
    def location(self) -> str:
        """The place as a user would write it."""
        ...

    def sizes(self, fingerprint: str) -> dict[str, int]:
        """The names of a tagger's segments, sorted, and their sizes in bytes."""
        ...

    def read(self, fingerprint: str, name: str) -> bytes | None:
        """A segment's bytes; None where it is gone."""
        ...

    def write(self, fingerprint: str, name: str, data: bytes) -> None:
        """Store a segment, whole or not at all; one that is there under that name stays."""
        ...

    def remove(self, fingerprint: str, name: str) -> None:
        """Delete a segment; nothing there: no effect."""
        ...

    def set_aside(self, fingerprint: str, name: str) -> None:
        """Move a damaged segment out of the way, where it can be looked at."""
        ...


class FolderShelf:
    """Segments in a plain folder: `<folder>/<fingerprint>/<sha256>.parquet`. Safe for many processes at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self._folder)

    def sizes(self, fingerprint: str) -> dict[str, int]:
        """By a listing of the folder; what vanishes meanwhile is left out."""
        sizes = {}
        for path in sorted((self._folder / fingerprint).glob(f"*{SUFFIX}")):
            try:
                sizes[path.name] = path.stat().st_size
            except FileNotFoundError:
                continue
        return sizes

    def read(self, fingerprint: str, name: str) -> bytes | None:
        """The file's bytes."""
        try:
            return (self._folder / fingerprint / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, fingerprint: str, name: str, data: bytes) -> None:
        """Beside it first, then renamed. Raises StoreError where the folder cannot be written."""
        target = self._folder / fingerprint / name
        beside = target.with_suffix(f".{secrets.token_hex(4)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(data)
            beside.replace(target)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise StoreError(
                f"tags cannot be kept in {target.parent}: {error}; free space, or mend its mode"
            ) from error

    def remove(self, fingerprint: str, name: str) -> None:
        """Unlink the file."""
        (self._folder / fingerprint / name).unlink(missing_ok=True)

    def set_aside(self, fingerprint: str, name: str) -> None:
        """Rename it to `<name>.damaged`."""
        path = self._folder / fingerprint / name
        try:
            path.replace(path.with_name(f"{name}.damaged"))
        except OSError as error:
            logger.warning("%s is not moved out of the way: %s", path, error)


class TagCache:
    """Finds and keeps tags on a shelf."""

    def __init__(self, shelf: SegmentShelf) -> None:
        self._shelf = shelf

    def lookup(self, fingerprint: str, schema: pa.Schema, keys: np.ndarray) -> tuple[np.ndarray, pa.Table]:
        """Which of `keys` (S16, any order, each once) have tags (bool, aligned), and these in the order of `keys`.

        One segment at a time is in memory, besides what was found.
        """
        hit = np.zeros(len(keys), dtype=bool)
        places, parts = [np.empty(0, dtype=np.int64)], [schema.empty_table()]
        for segment in self._segments(fingerprint, schema):
            wanted = np.flatnonzero(~hit)
            if not len(wanted):
                break
            stored = _keys_of(segment)
            found = np.searchsorted(stored, keys[wanted])
            found[found == len(stored)] = 0
            same = stored[found] == keys[wanted]
            places.append(wanted[same])
            parts.append(segment.select(schema.names).take(pa.array(found[same])))
            hit[wanted[same]] = True
        order = np.argsort(np.concatenate(places), kind="stable")
        return hit, pa.concat_tables(parts).take(pa.array(order))

    def append(self, fingerprint: str, keys: np.ndarray, table: pa.Table) -> None:
        """Keep the tags in `table` (a line a key, S16) as one more segment; durable on return."""
        if not len(keys):
            return
        self._write(fingerprint, _segment(keys, table))
        small = [name for name, size in self._shelf.sizes(fingerprint).items() if size < _SMALL_BYTES]
        if len(small) > _MANY_SEGMENTS:
            self._merge(fingerprint, table.schema, small)

    def _merge(self, fingerprint: str, schema: pa.Schema, names: Sequence[str]) -> None:
        sound = {name: segment for name in names if (segment := self._read(fingerprint, name, schema)) is not None}
        if len(sound) < 2:
            return
        together = pa.concat_tables(sound.values())
        keys, first = np.unique(_keys_of(together), return_index=True)
        merged = self._write(fingerprint, _segment(keys, together.take(pa.array(first)).select(schema.names)))
        for name in sound:
            # One of them may have held all the others.
            if name != merged:
                self._shelf.remove(fingerprint, name)

    def _write(self, fingerprint: str, segment: pa.Table) -> str:
        sink = pa.BufferOutputStream()
        pq.write_table(segment, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        name = f"{digest_bytes(data)}{SUFFIX}"
        self._shelf.write(fingerprint, name, data)
        return name

    def _segments(self, fingerprint: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """Every sound segment with a line; those that somebody merged meanwhile are found under their new name."""
        seen: set[str] = set()
        for _ in range(_LOOKS):
            names = [name for name in self._shelf.sizes(fingerprint) if name not in seen]
            if not names:
                return
            for name in names:
                seen.add(name)
                segment = self._read(fingerprint, name, schema)
                if segment is not None and segment.num_rows:
                    yield segment

    def _read(self, fingerprint: str, name: str, schema: pa.Schema) -> pa.Table | None:
        data = self._shelf.read(fingerprint, name)
        if data is None:
            return None
        fault = segment_fault(data, name)
        if fault is None:
            segment = pq.read_table(pa.BufferReader(data))
            if segment.schema.remove_metadata().equals(_segment_schema(schema)):
                return segment
            fault = f"it has the columns {segment.column_names}"
        logger.warning(
            "%s: tag segment %s/%s is damaged: %s; it is set aside and its rows are tagged again",
            self._shelf.location, fingerprint, name, fault,
        )  # fmt: skip
        self._shelf.set_aside(fingerprint, name)
        return None


def segment_fault(data: bytes, name: str) -> str | None:
    """What is wrong with the bytes found under a segment's name (its last part): None if they are what was written."""
    found = digest_bytes(data)
    return None if name == f"{found}{SUFFIX}" else f"its bytes have the SHA-256 {found}"


def _segment_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(_KEY_COLUMN, pa.binary(KEY_BYTES)), *schema])


def _segment(keys: np.ndarray, table: pa.Table) -> pa.Table:
    order = np.argsort(keys, kind="stable")
    data = np.ascontiguousarray(keys[order]).tobytes()
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(data)])
    schema = _segment_schema(table.schema.remove_metadata())
    columns = table.take(pa.array(order)).combine_chunks().columns
    return pa.Table.from_arrays([column, *columns], schema=schema)


def _keys_of(segment: pa.Table) -> np.ndarray:
    column = segment.column(_KEY_COLUMN).combine_chunks()
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    start = array.offset * KEY_BYTES
    return np.frombuffer(array.buffers()[1], dtype=np.uint8)[start : start + len(array) * KEY_BYTES].view(KEY_TYPE)
