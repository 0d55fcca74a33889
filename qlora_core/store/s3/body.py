"""A range of a file as the body of a request: read as it is sent, rewound for another try. Knows no S3."""

import os
from pathlib import Path
from typing import Self

from qlora_core.errors import StoreError
from qlora_core.store.disk import named_os_errors
from qlora_core.store.s3.patience import Patience

# The HTTP library asks for 16 KiB at a time, which costs it more time than sending; it may get more than it asked for.
_BLOCK_BYTES = 256 << 10


class FileSlice:
    """`length` bytes of `file` from `offset`. Memory is bounded by one block, whatever the length."""

    def __init__(self, file: Path, offset: int, length: int, patience: Patience) -> None:
        self._file = file
        self._failure: OSError | None = None
        with named_os_errors("read", file):
            self._descriptor = os.open(file, os.O_RDONLY)
        self._offset = offset
        self._length = length
        self._patience = patience
        self._at = 0
        self._furthest = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes. A block that is asked for means that the one before has left."""
        if self._at > self._furthest:
            # Only what no earlier try has sent: a server that takes the first bytes of every try gets nowhere.
            self._furthest = self._at
            self._patience.moved()
        if self._patience.is_out:
            raise TimeoutError("no byte has moved for too long")
        wanted = self._length - self._at
        if size >= 0:
            wanted = min(wanted, max(size, _BLOCK_BYTES))
        try:
            data = os.pread(self._descriptor, wanted, self._offset + self._at)
        except OSError as error:
            self._failure = error
            raise
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move within the slice."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        """Where in the slice the next byte is."""
        return self._at

    def rewind(self) -> None:
        """Prepare for another try. Raises StoreError if the last one failed at this end, for want of the file."""
        if self._failure is not None:
            raise StoreError(
                f"cannot read {self._file}: {self._failure.strerror}; look at that disk"
            ) from self._failure
        self._at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        os.close(self._descriptor)
