"""Real processes for milliseconds each: forked from one that has imported the store already and has no threads."""

import os
import signal
import sys
import traceback
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Start a process that does `work` and ends, with status 1 and a traceback if it raises; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        # Nothing of the parent's may be done twice: no clean-up, no output that waits in its buffers.
        if status:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)


def status_of(pid: int) -> int:
    """Wait for a process; its exit status, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_once(count: int, work: Callable[[int], object]) -> list[int]:
    """`work(number)` in as many processes, let go together when all are there; returns how they ended."""
    waiting, gate = os.pipe()

    def start(number: int) -> None:
        os.close(gate)
        # Ends when the last process has closed its end.
        os.read(waiting, 1)
        work(number)

    pids = [fork(lambda number=number: start(number)) for number in range(count)]
    os.close(gate)
    os.close(waiting)
    return [status_of(pid) for pid in pids]


def kill(pid: int) -> None:
    """End a process as a power cut would: no exception, no clean-up, nothing flushed."""
    os.kill(pid, signal.SIGKILL)
