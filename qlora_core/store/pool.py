"""Blobs on this machine, and the folders of hard links that stages read them through.

A folder store keeps its blobs in one, a bucket its local copies. With a size limit, what was used longest ago goes.

<root>/v1/blob/<aa>/<sha256>          a blob, read-only; its modification time is when it was last used
<root>/v1/view/<digest>/<path>        an artifact's files under their names, as hard links to blobs
<root>/v1/view/<digest>.lock          held, shared, by every process that was given this folder
<root>/v1/view/<digest>.<random>.part a link on its way into the folder

It believes no file: whoever asks for a blob gets it compared with its entry. It does not know manifests or servers.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_core.store.contents import file_fault, list_files
from qlora_core.store.disk import NO_LINKS, make_folder, named_os_errors, open_lock, put, sync_entry, wait_for_lock
from qlora_core.store.layout import BLOBS, blob_name
from qlora_core.store.manifest import FileEntry

logger = logging.getLogger(__name__)


class BlobPool:
    """The blobs under `root`. Safe for many processes at once; nothing is written before something is stored.

    `limit_bytes` bounds the blobs in the shared area: the least recently used go first, none in a folder that a living
    process was given. None means no bound, as for a store's own folder.
    """

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._held: dict[Path, int] = {}
        self._holding = threading.Lock()

    @property
    def root(self) -> Path:
        """The folder that everything of the pool is under."""
        return self._root

    @property
    def views(self) -> Path:
        """Where the folders of links are."""
        return self._root / "v1" / "view"

    def path(self, sha256: str, area: str = BLOBS) -> Path:
        """Where a blob is, or would be."""
        return self._root / blob_name(sha256, area)

    def fault(self, entry: FileEntry, area: str = BLOBS) -> str | None:
        """What is wrong with a blob, read in full: None if it matches its entry, which then counts as used."""
        path = self.path(entry.sha256, area)
        with named_os_errors("read", path):
            fault = file_fault(f"blob {entry.sha256}", path, entry)
        if fault is None:
            with contextlib.suppress(OSError):  # of another user: then its age stays as it is
                os.utime(path)
        return fault

    def adopt(self, file: Path, sha256: str, area: str = BLOBS, *, durable: bool = True) -> None:
        """Take over a file on the same file system as the blob of `sha256`.

        It replaces one that is there: what has just been hashed is sound, what lies there may not be. Where it is to be
        `durable` the file must be on disk already; a copy of what is kept elsewhere need not be.
        """
        target = self.path(sha256, area)
        with named_os_errors("write", target):
            file.chmod(0o444)
            os.utime(file)
            put(file, target, Path.rename, durable=durable)
            if durable:
                sync_entry(target)

    def view(self, digest: str, files: Mapping[str, FileEntry], area: str = BLOBS) -> Path | None:
        """The folder with exactly `files`, each one file with its blob, which `fault` has just found sound.

        None if a blob went meanwhile, evicted by another process. The folder is this process's until it ends: neither
        eviction nor garbage collection removes it.
        """
        folder = self.views / digest
        with named_os_errors("write to", folder):
            make_folder(folder)
            self._hold(folder)
            make_folder(folder)  # an eviction may have been faster than the lock
            for path, stray in list(list_files(folder)):
                if path not in files:
                    stray.unlink(missing_ok=True)
            try:
                for path, entry in files.items():
                    _link(self.path(entry.sha256, area), folder, path, entry)
            except FileNotFoundError:
                return None
        return folder

    def _hold(self, folder: Path) -> None:
        lock = folder.with_suffix(".lock")
        with self._holding:
            held = self._held.get(folder)
            if held is not None and os.fstat(held).st_nlink:
                return
            while True:
                # For reading alone: that is enough to share it, and can be had on a read-only disk.
                descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT, 0o666)
                # Alone with it: what processes left that were killed while they linked is nobody's.
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove_parts(folder)
                wait_for_lock(descriptor, lock, fcntl.LOCK_SH)
                if os.fstat(descriptor).st_nlink:
                    break
                os.close(descriptor)  # it was removed with its folder before it was locked
            self._held[folder] = descriptor

    def view_digests(self) -> set[str]:
        """The digests of all folders of links."""
        return {folder.name for folder in self._view_folders()}

    def in_use(self) -> set[str]:
        """The digests of the folders that living processes hold, this one included."""
        return {folder.name for folder in self._view_folders() if not _is_free(folder)}

    def remove_view(self, digest: str) -> bool:
        """Remove a folder of links; False if a living process holds it."""
        folder = self.views / digest
        with named_os_errors("remove", folder):
            return not folder.is_dir() or _remove_if_free(folder)

    def make_room(self) -> int:
        """Evict the least recently used blobs until the limit is kept; returns how many bytes went."""
        if self._limit_bytes is None:
            return 0
        freed = 0
        with named_os_errors("remove from", self._root):
            blobs = sorted(_files(self._root / BLOBS), key=lambda blob: blob[1].st_mtime)
            used = sum(stat.st_size for _, stat in blobs)
            kept = self._inodes_in_use() if used > self._limit_bytes else set()
            for path, stat in blobs:
                if used - freed <= self._limit_bytes:
                    break
                if stat.st_ino not in kept:
                    path.unlink(missing_ok=True)  # another process may evict at the same time
                    freed += stat.st_size
            if freed:
                self._drop_views_without_blobs()
                logger.info("evicted %.1f MB from %s", freed / 1e6, self._root)
        return freed

    def _inodes_in_use(self) -> set[int]:
        held = [folder for folder in self._view_folders() if not _is_free(folder)]
        return {stat.st_ino for folder in held for _, stat in _files(folder)}

    def _drop_views_without_blobs(self) -> None:
        alive = {stat.st_ino for _, stat in _files(self._root / BLOBS)}
        for folder in self._view_folders():
            if any(stat.st_ino not in alive for _, stat in _files(folder)):
                _remove_if_free(folder)

    def _view_folders(self) -> list[Path]:
        return sorted(path for path in self.views.glob("*") if path.is_dir()) if self.views.is_dir() else []


def _link(blob: Path, folder: Path, path: str, entry: FileEntry) -> None:
    """Make `path` in `folder` the same file as `blob`, or a copy where the file system has no hard links."""
    target = folder / path
    with contextlib.suppress(FileNotFoundError):
        found = target.stat(follow_symlinks=False)
        if os.path.samestat(found, blob.stat()):
            return
        if found.st_nlink == 1 and file_fault(path, target, entry) is None:
            return
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    fresh = folder.with_name(f"{folder.name}.{secrets.token_hex(6)}.part")
    try:
        os.link(blob, fresh)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(blob, fresh)
        fresh.chmod(0o444)
    put(fresh, target, Path.rename)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for _, path in list_files(folder):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat(follow_symlinks=False)


def _is_free(folder: Path) -> bool:
    """Whether no living process holds a folder of links."""
    try:
        with _exclusively(folder):
            return True
    except BlockingIOError:
        return False


def _remove_if_free(folder: Path) -> bool:
    try:
        with _exclusively(folder):
            _remove_parts(folder)
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return False
    return True


def _remove_parts(folder: Path) -> None:
    for part in folder.parent.glob(f"{folder.name}.*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _exclusively(folder: Path) -> Iterator[None]:
    """Hold a folder's lock alone for the block; BlockingIOError where a living process holds it.

    A lock whose folder is gone afterwards goes too.
    """
    lock = folder.with_suffix(".lock")
    while True:
        descriptor = open_lock(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(descriptor).st_nlink:
                continue  # removed with its folder before it was locked: somebody may hold a new one by now
            yield
            if not folder.is_dir():
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)
