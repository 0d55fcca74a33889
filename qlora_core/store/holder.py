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
        return cls(host=socket.gethostname(), boot=_boot(), namespace=_namespace(), pid=pid, started=_started(pid))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_dead(self) -> bool:
        """Whether the process is known to have ended; False where that cannot be seen from here."""
        if not self.boot or (self.boot, self.namespace) != (_boot(), _namespace()):
            return False
        return _started(self.pid) != self.started


def _boot() -> str:
    return _text("/proc/sys/kernel/random/boot_id")


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _started(pid: int) -> str:
    """Start time in clock ticks since boot, empty for a process that is gone or a zombie: numbers are used again."""
    # After the last bracket, since a process's name may hold spaces and brackets; field 22 of proc(5).
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if not fields or fields[0] in "ZX" else fields[19]


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""
