"""Ranges of a blob as whole pieces of it, so that what is read can be verified without the rest. Pure arithmetic."""

from dataclasses import dataclass

from qlora_core.digest import digest_bytes
from qlora_core.errors import StoreError
from qlora_core.store.manifest import PIECE_BYTES, FileEntry


@dataclass(frozen=True)
class PieceRange:
    """Pieces `first` to `last` of a blob, `length` bytes from `start`, which hold the range that was asked for."""

    first: int
    last: int
    start: int
    length: int
    skip: int
    wanted: int

    def cut(self, data: bytes) -> bytes:
        """The range out of the pieces' bytes."""
        return data[self.skip : self.skip + self.wanted]


def pieces_of_range(entry: FileEntry, offset: int, length: int) -> PieceRange:
    """The pieces that hold `length` bytes from `offset`. Raises StoreError for a range that is not inside the blob."""
    if offset < 0 or length < 0 or offset + length > entry.size_bytes:
        raise StoreError(
            f"bytes {offset} to {offset + length} are not inside blob {entry.sha256}, which has {entry.size_bytes}"
        )
    first = min(offset // PIECE_BYTES, len(entry.piece_digests) - 1)
    last = max(first, (offset + length - 1) // PIECE_BYTES)
    start = first * PIECE_BYTES
    end = min(entry.size_bytes, (last + 1) * PIECE_BYTES)
    return PieceRange(first, last, start, end - start, offset - start, length)


def piece_fault(entry: FileEntry, read: PieceRange, data: bytes) -> str | None:
    """What is wrong with the bytes of a piece range: None if each piece has its digest."""
    if len(data) != read.length:
        return f"blob {entry.sha256} is cut: {len(data)} bytes from {read.start} where {read.length} should be"
    view = memoryview(data)
    for index in range(read.first, read.last + 1):
        at = (index - read.first) * PIECE_BYTES
        found = digest_bytes(view[at : at + PIECE_BYTES])
        if found != entry.piece_digests[index]:
            return f"blob {entry.sha256}: piece {index} has sha256 {found}, not {entry.piece_digests[index]}"
    return None
