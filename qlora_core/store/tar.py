"""The simplest tar there is, written and read as a stream: regular files only, no times, owners, links or extensions.

Any tar program reads what is written here. What is read here is only what was written here: every extension of the
format is a way to say one name and mean another.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_core.errors import StoreError

COPY_BYTES = 1 << 20
_LARGEST_USTAR = (8 << 30) - 1


class TarWriter:
    """Writes members one after the other. Equal members give equal bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def add_bytes(self, name: str, data: bytes) -> None:
        """A member that is in memory."""
        self._stream.write(_header(name, len(data)) + data)
        self._pad(len(data))

    def add_stream(self, name: str, source: BinaryIO, size_bytes: int, advance: Callable[[float], None]) -> str:
        """A member read from `source`, whose size must be as said; returns its SHA-256."""
        self._stream.write(_header(name, size_bytes))
        digest = hashlib.sha256()
        left = size_bytes
        while left and (chunk := source.read(min(COPY_BYTES, left))):
            digest.update(chunk)
            self._stream.write(chunk)
            advance(len(chunk))
            left -= len(chunk)
        if left or source.read(1):
            raise StoreError(f"{name} does not have {size_bytes} bytes any more; run the same command again")
        self._pad(size_bytes)
        return digest.hexdigest()

    def finish(self) -> None:
        """The end of the archive."""
        self._stream.write(bytes(2 * tarfile.BLOCKSIZE))

    def _pad(self, size_bytes: int) -> None:
        self._stream.write(bytes(-size_bytes % tarfile.BLOCKSIZE))


class TarReader:
    """Reads members one after the other: (name, size), and `chunks` for the content of the one just named.

    Raises StoreError naming `file` for anything but an archive as written here.
    """

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream = stream
        self._file = file
        self._left = 0
        self._padding = 0

    def __iter__(self) -> Iterator[tuple[str, int]]:
        while True:
            for _ in self.chunks():
                pass  # what nobody asked for
            self._expect_zeros(self._read(self._padding))
            self._padding = 0
            block = self._read(tarfile.BLOCKSIZE)
            if not block.strip(b"\0"):
                self._expect_zeros(self._read(tarfile.BLOCKSIZE))
                while rest := self._stream.read(COPY_BYTES):  # other programs write more of them
                    self._expect_zeros(rest)
                return
            member = self._parse(block)
            self._left = member.size
            self._padding = -member.size % tarfile.BLOCKSIZE
            yield member.name, member.size

    def chunks(self) -> Iterator[bytes]:
        """The content of the member that was named last, in pieces."""
        while self._left:
            chunk = self._stream.read(min(COPY_BYTES, self._left))
            if not chunk:
                raise self._cut()
            self._left -= len(chunk)
            yield chunk

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise StoreError(
                f"{self._file} is no tar file that `qlora store export` wrote ({error}); a compressed one must be "
                "unpacked to plain tar first"
            ) from error
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.linkname:
            kind = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder"}
            raise StoreError(
                f"{self._file} holds {member.name!r}, which is {kind.get(member.type, 'no plain file')}; nothing but "
                "plain files as `qlora store export` writes them is taken"
            )
        if member.size < 0:
            raise StoreError(f"{self._file} holds {member.name!r} with an impossible size, {member.size}")
        return member

    def _read(self, length: int) -> bytes:
        data = self._stream.read(length)
        if len(data) != length:
            raise self._cut()
        return data

    def _expect_zeros(self, data: bytes) -> None:
        if data.strip(b"\0"):
            raise StoreError(f"{self._file} is damaged: there is something where nothing should be; export it again")

    def _cut(self) -> StoreError:
        return StoreError(f"{self._file} is cut off: it ends before the archive does; copy or export it again")


def _header(name: str, size_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    member.mode = 0o644
    # Sizes of 8 GiB and more do not fit the standard's digits; GNU's way to write them is read everywhere.
    form = tarfile.USTAR_FORMAT if size_bytes <= _LARGEST_USTAR else tarfile.GNU_FORMAT
    return member.tobuf(form, "ascii", "strict")
