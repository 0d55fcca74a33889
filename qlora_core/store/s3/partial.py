"""A blob on its way to this machine: a file that survives the process, so that the next fetches only what is missing.

<pool root>/v1/partial/<sha256>          what has come so far, each piece at its place
<pool root>/v1/partial/<sha256>.lock     held by the process that fetches it

Nothing in it is believed: a piece counts once it has been compared with its digest, and so does the whole.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from qlora_core.store.disk import named_os_errors
from qlora_core.store.layout import VERSION
from qlora_core.store.manifest import PIECE_BYTES, FileEntry

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20


class PartialBlob:
    """The file of one blob, for several threads that fetch its pieces. Made by `open`."""

    def __init__(self, path: Path, entry: FileEntry, lock: int) -> None:
        self.path = path
        self.entry = entry
        self._lock = lock
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._changing = threading.Lock()
        self._sound: set[int] = set()
        self._whole = hashlib.sha256()
        self._hashed = 0
        self._is_hashing = False

    @staticmethod
    def path_of(root: Path, sha256: str) -> Path:
        """Where the file of a blob is under a pool's root."""
        return root / VERSION / "partial" / sha256

    @classmethod
    def open(cls, root: Path, entry: FileEntry) -> "PartialBlob | None":
        """The blob's file under a pool's root, locked; None while another process or thread fetches it."""
        path = cls.path_of(root, entry.sha256)
        with named_os_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            if lock is None:
                return None
            try:
                return cls(path, entry, lock)
            except BaseException:
                os.close(lock)
                raise

    def close(self, *, done: bool) -> None:
        """Unlock it. When it is `done`, the file has been moved away or is of no use, and nothing stays."""
        os.close(self._descriptor)
        if done:
            self.path.unlink(missing_ok=True)
            _lock_file(self.path).unlink(missing_ok=True)
        os.close(self._lock)

    def has(self, index: int) -> bool:
        """Whether a piece is there already from an earlier attempt."""
        start, length = self.bounds(index)
        if os.fstat(self._descriptor).st_size < start + length:
            return False
        found = hashlib.sha256()
        for block in self._blocks(start, length):
            found.update(block)
        return found.hexdigest() == self.entry.piece_digests[index]

    def bounds(self, index: int) -> tuple[int, int]:
        """Where a piece begins, and its length."""
        start = index * PIECE_BYTES
        return start, min(PIECE_BYTES, self.entry.size_bytes - start)

    def write(self, data: bytes, at: int) -> None:
        """Write bytes at their place."""
        with named_os_errors("write", self.path):
            while data:
                written = os.pwrite(self._descriptor, data, at)
                data, at = data[written:], at + written

    def piece_is_sound(self, index: int) -> bool:
        """Note that a piece has its digest. True for one caller: when all have, and the whole has been hashed."""
        with self._changing:
            self._sound.add(index)
            if self._is_hashing:
                return False
            self._is_hashing = True
        # One thread at a time hashes the whole, as far as the pieces go; they are still in memory then.
        while True:
            with self._changing:
                if self._hashed not in self._sound:
                    self._is_hashing = False
                    return self._hashed == len(self.entry.piece_digests)
            if self.entry.pieces:
                for block in self._blocks(*self.bounds(self._hashed)):
                    self._whole.update(block)
            self._hashed += 1

    @property
    def is_sound(self) -> bool:
        """Whether the whole has its digest, once all pieces have theirs."""
        # A file of one piece has been compared with the digest of the whole by then.
        return not self.entry.pieces or self._whole.hexdigest() == self.entry.sha256

    def cut(self) -> None:
        """Cut off what an earlier attempt, or another size, has left behind the end."""
        with named_os_errors("write", self.path):
            os.ftruncate(self._descriptor, self.entry.size_bytes)

    def _blocks(self, start: int, length: int) -> Iterator[bytes]:
        with named_os_errors("read", self.path):
            for at in range(start, start + length, _BLOCK_BYTES):
                yield os.pread(self._descriptor, min(_BLOCK_BYTES, start + length - at), at)


def remove_old(root: Path, older_than_s: float) -> int:
    """Remove downloads that nobody has gone on with for as long; returns how many."""
    removed = 0
    for path in (root / VERSION / "partial").glob("*"):
        with contextlib.suppress(OSError):
            if path.suffix or time.time() - path.stat().st_mtime < older_than_s:
                continue
            lock = _lock(path)
            if lock is not None:
                path.unlink(missing_ok=True)
                _lock_file(path).unlink(missing_ok=True)
                os.close(lock)
                removed += 1
                logger.info("removed %s, a download that was broken off long ago", path)
    return removed


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _lock(path: Path) -> int | None:
    """The descriptor of the lock, held; None where another has it."""
    while True:
        descriptor = os.open(_lock_file(path), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # it was removed, with its blob done, before it was locked
