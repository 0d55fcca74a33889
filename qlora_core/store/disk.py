"""What every file of a store needs of the operating system: durable writes, locks, refusals in words.

It does not know what the files are.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_core.errors import StoreError, StoreUnavailableError
from qlora_core.store.contents import sync_to_disk

_NEXT_STEPS = {
    errno.ENOSPC: "the disk is full: free space, or point `store` at another folder",
    errno.EDQUOT: "the quota is used up: free space, or point `store` at another folder",
    errno.EROFS: "it is mounted read-only: mount it writable, or point `store` at a folder you may write to",
    errno.EACCES: "give yourself permission, or point `store` at a folder you may write to",
    errno.EPERM: "give yourself permission, or point `store` at a folder you may write to",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or point `store` at another folder",
    errno.EEXIST: "a file stands where a folder is needed: move it away, or point `store` at another folder",
}
NEXT_STEP = "look at that disk, or point `store` at another folder"
# How file systems without hard links, or at the end of them, refuse one.
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
_LOCK_WAIT_S = 30.0
_LOCK_POLL_S = 0.01
# Others may remove a folder just as often as it is made, but not for ever.
_FOLDER_WAIT_S = 2.0
_FOLDER_POLL_S = 0.001


@contextmanager
def named_os_errors(action: str, path: Path) -> Iterator[None]:
    """Turn what the operating system refuses in the block into StoreError: the path, the cause, the next step."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            # Not the operating system's: our own errors, and those of network libraries.
            raise
        step = _NEXT_STEPS.get(error.errno, NEXT_STEP)
        raise StoreError(f"cannot {action} {path}: {error.strerror or error}; {step}") from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and return only when it would survive a power cut (its folder's entry aside)."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def make_folder(path: Path, *, durable: bool = True) -> None:
    """Make a folder and those above it, each on disk in the one above it. Others may remove empty ones meanwhile."""
    deadline = time.monotonic() + _FOLDER_WAIT_S
    while not path.is_dir():
        make_folder(path.parent, durable=durable)
        try:
            path.mkdir()
        except FileNotFoundError:
            _pause_before(deadline, path)
            continue
        except FileExistsError:
            if path.is_dir() or not os.path.lexists(path):
                continue
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        if durable:
            sync_entry(path)


def put(source: Path, target: Path, move: Callable[[Path, Path], object], *, durable: bool = True) -> None:
    """`move(source, target)`; the target's folder is made first, and again if a removal took it meanwhile."""
    deadline = time.monotonic() + _FOLDER_WAIT_S
    while True:
        make_folder(target.parent, durable=durable)
        try:
            move(source, target)
        except FileNotFoundError:
            if not source.exists():
                raise
            _pause_before(deadline, target.parent)
        else:
            return


def _pause_before(deadline: float, folder: Path) -> None:
    """Wait a little before a folder is made again; StoreError once that has gone on for too long."""
    if time.monotonic() > deadline:
        raise StoreError(
            f"cannot make the folder {folder}: it is not there again and again, for {_FOLDER_WAIT_S:.0f} s; this file "
            f"system takes no folders there, or somebody removes them all the time; {NEXT_STEP}"
        )
    time.sleep(_FOLDER_POLL_S)


def sync_entry(path: Path) -> None:
    """Return only when `path` would be found in its folder after a power cut."""
    with contextlib.suppress(FileNotFoundError):  # removed by now, and its folder with it: nothing to keep
        sync_to_disk(path.parent)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, made if it is missing. One that may only be read can be locked as well."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY)


def wait_for_lock(descriptor: int, path: Path, kind: int) -> None:
    """Lock for the descriptor's life: LOCK_SH or LOCK_EX. StoreUnavailableError when a holder does not let go."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                raise StoreUnavailableError(
                    f"{path} has been locked for {_LOCK_WAIT_S:.0f} s by another process, which may be stopped; "
                    "continue or end that process, then run the same command again"
                ) from error
            time.sleep(_LOCK_POLL_S)
        else:
            return
