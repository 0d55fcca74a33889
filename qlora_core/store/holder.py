"""Which process holds a lease, in terms that another process can check: alive, dead, or beyond its sight."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict


class Holder(BaseModel):
    """A process. It can be seen from where boot and process namespace are the same; hosts of one name are many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def this_process(cls) -> Self:
        """The running process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(), boot=_boot(), namespace=_namespace(), pid=pid, started=_started(pid) or ""
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_dead(self) -> bool:
        """Whether the process is known to have ended; False where that cannot be seen from here."""
        if not self.boot or (self.boot, self.namespace) != (_boot(), _namespace()):
            return False
        started = _started(self.pid)
        # Processes of other users may be hidden (hidepid): then only the number tells, and after that the expiry.
        return not _is_taken(self.pid) if started is None else started != self.started


def _boot() -> str:
    return _text("/proc/sys/kernel/random/boot_id")


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _started(pid: int) -> str | None:
    """Start time in clock ticks since boot, as numbers are used again; empty for a zombie, None where none is seen."""
    # After the last bracket, since a process's name may hold spaces and brackets; field 22 of proc(5).
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not fields:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _is_taken(pid: int) -> bool:
    """Whether some process has the number, though it may be another's by now."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""
