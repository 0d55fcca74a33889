"""Artifacts in a folder. Knows POSIX files, renames and locks.

Below the root:

v1/stage/<stage>/<key>/manifest.json, files/...    an artifact, put here by one rename of the whole folder
v1/tmp/<host>-<pid>-<random>/, and the same .lock  what a producer is building; the lock is free once it is dead
v1/quarantine/<stage>-<key>-<random>/              what failed verification
v1/<name>.lock                                     locks, as the one held while an artifact is set aside
"""

import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from qlora_core.errors import CorruptArtifactError, StoreError
from qlora_core.store.contents import sync_to_disk, verify
from qlora_core.store.manifest import MANIFEST_FILE, Manifest

logger = logging.getLogger(__name__)

_FILES = "files"
_NEXT_STEPS = {
    errno.ENOSPC: "the disk is full: free space, or point `store` at another folder",
    errno.EDQUOT: "the quota is used up: free space, or point `store` at another folder",
    errno.EROFS: "it is mounted read-only: mount it writable, or point `store` at a folder you may write to",
    errno.EACCES: "give yourself permission, or point `store` at a folder you may write to",
    errno.EPERM: "give yourself permission, or point `store` at a folder you may write to",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or point `store` at another folder",
    errno.EEXIST: "a file stands where a folder is needed: move it away, or point `store` at another folder",
}
_NEXT_STEP = "look at that disk, or point `store` at another folder"


class LocalFolder:
    """The folder backend. Opening removes what dead producers of this machine left in `v1/tmp`, and writes nothing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / "v1" / "tmp"
        with named_os_errors("open the store", root):
            self._remove_stale_staging()

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self._root)

    def read_manifest(self, address: str) -> bytes | None:
        """The manifest's bytes; None where there is no folder. A folder without a manifest is corrupt."""
        folder = self._root / address
        with named_os_errors("read", folder):
            try:
                return (folder / MANIFEST_FILE).read_bytes()
            except FileNotFoundError:
                if not folder.exists():
                    return None
        raise CorruptArtifactError(f"{address}/{MANIFEST_FILE} is missing beside the artifact's files")

    def fetch(self, manifest: Manifest) -> Path:
        """The artifact's own folder of files, after verification."""
        folder = self._root / manifest.address / _FILES
        with named_os_errors("read", folder):
            verify(folder, manifest)
        return folder

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the same file system as the artifacts, so that a rename publishes it."""
        with named_os_errors("write to", self._staging):
            self._staging.mkdir(parents=True, exist_ok=True)
            home, lock, descriptor = self._create_staging()
        try:
            with named_os_errors("write to", home):
                (home / _FILES).mkdir(parents=True)
            yield home / _FILES
        finally:
            shutil.rmtree(home, ignore_errors=True)
            # Last, and after the folder: a lock without its folder is harmless, a folder without a lock never goes.
            lock.unlink(missing_ok=True)
            os.close(descriptor)

    def publish(self, folder: Path, manifest: Manifest) -> Path | None:
        """Write the manifest beside the files, then rename both to the address; None if something is there already."""
        target = self._root / manifest.address
        with named_os_errors("write", target):
            home = folder.parent
            _write_synced(home / MANIFEST_FILE, manifest.to_json())
            sync_to_disk(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                home.rename(target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return None
                raise
            sync_to_disk(target.parent)
        return target / _FILES

    def repairing(self) -> AbstractContextManager[None]:
        """Hold the folder's repair lock; the kernel frees it when its holder dies."""
        return self.locked("repair")

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Wait for and hold the folder's lock called `name`. A holder that asks again waits for itself."""
        path = self._root / "v1" / f"{name}.lock"
        with named_os_errors("lock", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with named_os_errors("lock", path):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def set_aside(self, address: str) -> None:
        """Rename the artifact's folder into quarantine."""
        source = self._root / address
        target = self._root / "v1" / "quarantine" / f"{source.parent.name}-{source.name}-{secrets.token_hex(4)}"
        with named_os_errors("move", source):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                source.rename(target)
            except FileNotFoundError:
                return
        logger.info("moved %s to %s", source, target)

    def check(self) -> None:
        """Write, read and rename a probe file, and remove it."""
        with self.staging() as folder, named_os_errors("write to", self._root):
            probe = os.urandom(1 << 12)
            _write_synced(folder / "probe.txt", probe)
            moved = (folder / "probe.txt").rename(folder.parent / "probe.txt")
            if moved.read_bytes() != probe:
                raise StoreError(f"{self._root} gives back other bytes than were written; {_NEXT_STEP}")

    def _create_staging(self) -> tuple[Path, Path, int]:
        while True:
            home = self._staging / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
            lock = self._staging / f"{home.name}.lock"
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return home, lock, descriptor
            except BlockingIOError:
                pass
            # Somebody took the fresh lock file for a dead producer's before it was locked: leave it to them.
            os.close(descriptor)

    def _remove_stale_staging(self) -> None:
        for lock in self._staging.glob("*.lock"):
            # Locks of other machines may be invisible here, so their folders are left alone.
            if lock.stem.rsplit("-", 2)[0] != socket.gethostname():
                continue
            try:
                _remove_if_abandoned(lock)
            except OSError as error:
                # Alive, or gone by now, or another user's: in none of these cases is it ours to remove.
                logger.debug("%s stays: %s", lock, error)


def _remove_if_abandoned(lock: Path) -> None:
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()
        logger.info("removed %s, which a dead process left unfinished", lock.with_suffix(""))
    finally:
        os.close(descriptor)


@contextmanager
def named_os_errors(action: str, path: Path) -> Iterator[None]:
    """Turn what the operating system refuses in the block into StoreError: the path, the cause, the next step."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            # Not the operating system's: our own errors, and those of network libraries.
            raise
        step = _NEXT_STEPS.get(error.errno, _NEXT_STEP)
        raise StoreError(f"cannot {action} {path}: {error.strerror or error}; {step}") from error


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
