"""Who may write in a folder: an exclusive lock that the kernel frees when its holder dies, however it dies."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_core.errors import SweepError

DRIVER_LOCK = "driver.lock"
"""In a sweep's work folder: who drives the sweep."""

OTHER_DRIVER_S = 2.0
"""How long another driver may still take to end."""

_POLL_S = 0.2


@contextmanager
def exclusive_lock(path: Path, *, purpose: str, wait_s: float) -> Iterator[None]:
    """Hold `path` (created if need be) for the block; wait up to `wait_s` for another holder to leave or die.

    Raises SweepError, naming `purpose` and the holder's process id, when the wait is over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        _acquire(stream.fileno(), path, purpose, wait_s)
        stream.seek(0)
        stream.truncate()
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def _acquire(descriptor: int, path: Path, purpose: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = path.read_text().strip() or "unknown"
                raise SweepError(
                    f"{purpose}: process {holder} holds {path}; wait for it or end it, then run the same command again"
                ) from None
            time.sleep(_POLL_S)
        else:
            return
