"""A folder as the place of a store: blobs are files in its pool, records small files beside them.

Besides the names in `layout` it has
v1/tmp/<host>-<pid>-<random>/, and the same .lock   what a process is writing; the lock is free once it is dead
v1/lock/<aa>.lock                                   held while a record is compared and swapped; by its name's digest
v1/view/...                                         folders of links, see `pool`

It does not know what records mean.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from qlora_core.digest import digest_bytes, digest_file
from qlora_core.errors import CorruptArtifactError, StoreError
from qlora_core.store.backend import Listed, Record, checked_name, is_name
from qlora_core.store.contents import SYNCS_AT_ONCE, in_parallel, list_files
from qlora_core.store.disk import (
    NEXT_STEP,
    NO_LINKS,
    make_folder,
    named_os_errors,
    open_lock,
    put,
    sync_entry,
    wait_for_lock,
    write_synced,
)
from qlora_core.store.layout import QUARANTINE, VERSION, blob_name
from qlora_core.store.manifest import FileEntry
from qlora_core.store.pieces import piece_fault, pieces_of_range
from qlora_core.store.pool import BlobPool

logger = logging.getLogger(__name__)

_FOREIGN_STAGING_S = 7 * 86400.0


class LocalFolder:
    """The folder backend. Opening removes what dead processes of this machine left in `v1/tmp`, and writes nothing."""

    def __init__(self, root: Path, pool: BlobPool | None = None) -> None:
        self._root = root
        self._tmp = root / VERSION / "tmp"
        self._pool = pool or BlobPool(root)
        with named_os_errors("open the store", root):
            self._remove_stale_staging()

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self._root)

    @property
    def pool(self) -> BlobPool:
        """The folder's own blobs."""
        return self._pool

    @property
    def pool_is_copies(self) -> bool:
        """The pool is the place itself."""
        return False

    def read(self, name: str) -> Record | None:
        """The record; its tag is the digest of its bytes."""
        path = self._root / checked_name(name)
        with named_os_errors("read", path):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return None
        return Record(data, digest_bytes(data))

    def create(self, name: str, data: bytes) -> str | None:
        """Write the record beside, and link it to its name, which fails where one is."""
        target = self._root / checked_name(name)
        with self._written(name, data) as file:
            try:
                put(file, target, os.link)
            except FileExistsError:
                return None
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                # No file can be made under a second name here. Everybody comes this way then, and looks under the lock.
                with self._locked(name):
                    if target.exists():
                        return None
                    put(file, target, Path.rename)
            sync_entry(target)
        return digest_bytes(data)

    def replace(self, name: str, data: bytes, tag: str) -> str | None:
        """Compare and rename, under the lock of this name."""
        target = self._root / checked_name(name)
        with self._written(name, data) as file:
            with self._locked(name):
                found = self.read(name)
                if found is None or found.tag != tag:
                    return None
                file.rename(target)
            # Without the lock: the less is done under it, the less likely a process is stopped there.
            sync_entry(target)
        return digest_bytes(data)

    def remove(self, name: str, tag: str | None = None) -> bool:
        """Delete a file, under the lock of its name."""
        target = self._root / checked_name(name)
        with named_os_errors("remove", target):
            if not target.exists():
                return False
            with self._locked(name):
                if tag is not None and ((found := self.read(name)) is None or found.tag != tag):
                    return False
                try:
                    target.unlink()
                except FileNotFoundError:
                    return False
            with contextlib.suppress(OSError):  # not empty, or in use again
                target.parent.rmdir()
        return True

    def list(self, prefix: str) -> Iterator[Listed]:
        """Every file under the prefix."""
        with named_os_errors("list", self._root / prefix):
            for path in sorted(name for name, _ in list_files(self._root / prefix)):
                if not is_name(f"{prefix}{path}"):
                    logger.warning("%r in %s is no name in a store and left alone", path, self._root / prefix)
                    continue
                try:
                    stat = (self._root / prefix / path).stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield Listed(f"{prefix}{path}", stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the same file system as the blobs, so that a rename stores what is in it."""
        with named_os_errors("write to", self._tmp):
            make_folder(self._tmp)
            home, lock, descriptor = self._create_staging()
        try:
            with named_os_errors("write to", home):
                home.mkdir()
            yield home
        finally:
            shutil.rmtree(home, ignore_errors=True)
            # Last, and after the folder: a lock without its folder is harmless, a folder without a lock never goes.
            lock.unlink(missing_ok=True)
            os.close(descriptor)

    def send(self, folder: Path, files: Mapping[str, FileEntry], area: str) -> None:
        """Rename the files into the pool."""

        def adopt(path: str) -> None:
            sha256 = files[path].sha256
            # Under the lock, so that nobody who has just seen a spoiled blob moves the sound one away.
            with self._locked(blob_name(sha256, area)):
                self._pool.adopt(folder / path, sha256, area)

        in_parallel(adopt, files, at_once=SYNCS_AT_ONCE)

    def fetch(self, entries: Iterable[FileEntry], area: str) -> None:
        """Compare the blobs with their entries; they are here already."""
        wanted = {entry.sha256: entry for entry in entries}
        faults: list[str] = []

        def look(sha256: str) -> None:
            if fault := self._fault_set_aside(wanted[sha256], area):
                faults.append(fault)

        in_parallel(look, wanted, at_once=os.cpu_count() or 1)
        if faults:
            raise CorruptArtifactError("; ".join(sorted(faults)))

    def read_range(self, entry: FileEntry, offset: int, length: int, area: str) -> bytes:
        """Read the pieces that hold the range, and compare each."""
        path = self._pool.path(entry.sha256, area)
        read = pieces_of_range(entry, offset, length)
        with named_os_errors("read", path):
            try:
                with path.open("rb") as stream:
                    stream.seek(read.start)
                    data = stream.read(read.length)
            except FileNotFoundError as error:
                raise CorruptArtifactError(f"blob {entry.sha256} is missing") from error
        if fault := piece_fault(entry, read, data):
            raise CorruptArtifactError(fault)
        return read.cut(data)

    def blob_fault(self, entry: FileEntry, area: str) -> str | None:
        """The pool is the place itself."""
        return self._pool.fault(entry, area)

    def set_aside(self, name: str) -> None:
        """Rename the file into quarantine."""
        source = self._root / checked_name(name)
        target = self._root / QUARANTINE / f"{name.removeprefix(f'{VERSION}/')}-{secrets.token_hex(4)}"
        with named_os_errors("move", source):
            if not source.exists():
                return
            try:
                put(source, target, Path.rename)
                os.utime(target)  # its age in quarantine counts from now
            except FileNotFoundError:
                return
        logger.info("moved %s to %s", source, target)

    def sweep_leftovers(self, older_than_s: float) -> int:
        """Remove staging folders of dead processes: of this machine at once, of others once untouched for a week."""
        untouched_s = max(older_than_s, _FOREIGN_STAGING_S)
        with named_os_errors("remove from", self._tmp):
            foreign = [lock for lock in self._tmp.glob("*.lock") if not _is_from_here(lock)]
            removed = sum(_is_untouched(lock, untouched_s) and _remove_if_dead(lock) for lock in foreign)
        return removed + self._remove_stale_staging()

    def check(self) -> None:
        """Write, replace, read and remove a probe."""
        name = f"{VERSION}/probe/{secrets.token_hex(8)}"
        first, second = os.urandom(1 << 12), os.urandom(64)
        try:
            tag = self.create(name, first)
            swapped = tag and self.replace(name, second, tag)
            if not swapped or self.create(name, first) or self.replace(name, first, tag or ""):
                raise StoreError(f"{self._root} does not keep one writer from another's file; {NEXT_STEP}")
            if (found := self.read(name)) is None or found.data != second:
                raise StoreError(f"{self._root} gives back other bytes than were written; {NEXT_STEP}")
        finally:
            self.remove(name)

    def _fault_set_aside(self, entry: FileEntry, area: str) -> str | None:
        """The blob's fault, None if it is sound; what does not match its name is moved to quarantine."""
        name, path = blob_name(entry.sha256, area), self._pool.path(entry.sha256, area)
        while True:
            seen = _identity(path)
            fault = self._pool.fault(entry, area)
            if fault is None:
                return None
            is_its_name = _is_its_name(path)
            try:
                with self._locked(name):
                    if _identity(path) != seen:
                        continue  # another process has seen to it meanwhile
                    if not is_its_name:
                        self.set_aside(name)
            except StoreError as error:
                logger.warning("%s is not moved to quarantine: %s", path, error)
            return fault

    @contextlib.contextmanager
    def _written(self, name: str, data: bytes) -> Iterator[Path]:
        """The bytes in a file of their own, on disk, on the same file system."""
        with self.staging() as home, named_os_errors("write", self._root / name):
            write_synced(home / "record", data)
            yield home / "record"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        path = self._root / VERSION / "lock" / f"{digest_bytes(name.encode())[:2]}.lock"
        with named_os_errors("lock", path):
            make_folder(path.parent)
            descriptor = open_lock(path)
        try:
            wait_for_lock(descriptor, path, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _create_staging(self) -> tuple[Path, Path, int]:
        while True:
            home = self._tmp / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
            lock = self._tmp / f"{home.name}.lock"
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return home, lock, descriptor
            except BlockingIOError:
                pass
            # Somebody took the fresh lock file for a dead producer's before it was locked: leave it to them.
            os.close(descriptor)

    def _remove_stale_staging(self) -> int:
        # Locks of other machines may be invisible here, so their folders are left alone.
        return sum(_remove_if_dead(lock) for lock in self._tmp.glob("*.lock") if _is_from_here(lock))


def _identity(path: Path) -> tuple[int, ...] | None:
    with contextlib.suppress(FileNotFoundError):
        stat = path.stat(follow_symlinks=False)
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None


def _is_its_name(blob: Path) -> bool:
    """Whether a blob is sound, and only an entry wrong about its size."""
    with contextlib.suppress(OSError):
        return digest_file(blob) == blob.name
    return False


def _is_from_here(lock: Path) -> bool:
    return lock.stem.rsplit("-", 2)[0] == socket.gethostname()


def _is_untouched(lock: Path, for_s: float) -> bool:
    """Whether nothing in a staging folder was changed for so long."""
    with contextlib.suppress(FileNotFoundError):
        home = lock.with_suffix("")
        paths = [lock, *([home, *home.rglob("*")] if home.is_dir() else [])]
        return time.time() - max(path.stat(follow_symlinks=False).st_mtime for path in paths) > for_s
    return False


def _remove_if_dead(lock: Path) -> bool:
    """Remove a staging folder, and return True, if the process that made it has ended."""
    try:
        _remove_if_abandoned(lock)
    except OSError as error:
        # Alive, or gone by now, or another user's: in none of these cases is it ours to remove.
        logger.debug("%s stays: %s", lock, error)
        return False
    return True


def _remove_if_abandoned(lock: Path) -> None:
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()
        logger.info("removed %s, which a dead process left unfinished", lock.with_suffix(""))
    finally:
        os.close(descriptor)
