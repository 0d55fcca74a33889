"""The bytes of a dataset file, unpacked where they are gzip, in pieces of bounded size. Does not know what they say."""

import gzip
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
UTF8_MARK = b"\xef\xbb\xbf"
PIECE_BYTES = 1 << 20

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its end, and its number from 1; `data` is None if it was too long to be kept."""

    number: int
    data: bytes | None


class SourceStream:
    """One pass over a file's bytes, without the mark that some editors put before UTF-8.

    Every method raises DataError, naming the file and the line, if the file cannot be read or its gzip is damaged: rows
    before the damage are no sign that the rest is worth nothing.
    """

    def __init__(self, file: SourceFile) -> None:
        self._name = file.name
        self._newlines = 0
        self._open = ExitStack()
        try:
            self._raw: IO[bytes] | gzip.GzipFile = self._guarded(lambda: self._open.enter_context(file.path.open("rb")))
            if self._guarded(lambda: self._raw.read(2)) == GZIP_MAGIC:
                self._raw.seek(0)
                self._raw = self._open.enter_context(gzip.GzipFile(fileobj=self._raw))
            self._rewind()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        data = self._guarded(lambda: self._raw.read(size))
        self._newlines += data.count(b"\n")
        return data

    def lines(self, max_bytes: int) -> Iterator[Line]:
        """The lines that are left, blank ones too. One of over `max_bytes` is passed over in pieces, never held."""
        while data := self._guarded(lambda: self._raw.readline(max_bytes + 2)):
            number = self._newlines + 1
            text = data.rstrip(b"\r\n")
            fits = len(text) <= max_bytes
            while not data.endswith(b"\n") and (data := self._guarded(lambda: self._raw.readline(PIECE_BYTES))):
                fits = fits and not data.strip(b"\r\n")
            self._newlines = number
            yield Line(number, text if fits else None)

    def seekable(self) -> IO[bytes]:
        """The whole content as a file that can be read at any place, unpacked into a temporary file if need be."""
        self._rewind()
        if not isinstance(self._raw, gzip.GzipFile):
            return self._raw
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="qlora-unpacked-")))
        with (folder / "file").open("wb") as unpacked:
            while piece := self.read(PIECE_BYTES):
                unpacked.write(piece)
        return self._open.enter_context((folder / "file").open("rb"))

    def _rewind(self) -> None:
        self._guarded(lambda: self._raw.seek(0))
        if self._guarded(lambda: self._raw.read(len(UTF8_MARK))) != UTF8_MARK:
            self._guarded(lambda: self._raw.seek(0))

    def _guarded(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"dataset file {self._name} is a damaged gzip file: after line {self._newlines} of its text, {error}. "
                "Fetch it again, or take it out of data.sources"
            ) from error
        except OSError as error:
            raise DataError(
                f"dataset file {self._name} cannot be read: {error.strerror or error}. Check its permissions"
            ) from error
