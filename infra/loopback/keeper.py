"""Keeps processes running and leaves none behind: not after Ctrl-C, not after a crash of any one process of the stack.

Two processes share the task. The *front* is what the user started; its child, the *keeper*, starts the services. The
kernel hands every process that loses its parent to the nearest of the two (PR_SET_CHILD_SUBREAPER, Linux), so that
whichever of them outlives the other finds all that is left among its descendants and ends it. Knows no service.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from infra.loopback.postgres import as_user
from infra.loopback.service import Service, StackError

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.25
_GRACE_S = 15.0
_LOG_TAIL = 2000


class StopRequestedError(Exception):
    """The front is gone or wants the stack to end."""


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise StackError(f"prctl failed: {os.strerror(ctypes.get_errno())}; this needs Linux 3.4 or later")


def end_descendants(grace_s: float = 0.0) -> None:
    """End every process below this one: those alive after SIGTERM and `grace_s` by SIGKILL, until none is left."""
    if grace_s > 0:
        found = psutil.Process().children(recursive=True)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(found, timeout=grace_s)
    while found := psutil.Process().children(recursive=True):
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=_POLL_S)
        _reap()


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class Keeper:
    """Starts services, each with a log in `logs`, and ends them in reverse. `lifeline` is at its end with the front."""

    def __init__(self, logs: Path, lifeline: IO[bytes]) -> None:
        self._logs = logs
        self._lifeline = lifeline
        self._running: list[tuple[Service, subprocess.Popen[bytes]]] = []

    def start(self, services: Sequence[Service]) -> None:
        """Start them together and return when all are ready.

        Raises StackError for one that ends or is not ready in time, StopRequestedError when the front is gone.
        """
        for service in services:
            with (self._logs / f"{service.name}.log").open("wb") as log:
                process: Any = subprocess.Popen(
                    service.command,
                    env=dict(service.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd="/" if service.user else None,
                    start_new_session=True,
                    **as_user(service.user),
                )
            self._running.append((service, process))
        began, waiting = time.monotonic(), list(services)
        while waiting := [service for service in waiting if not service.ready()]:
            self.check()
            for service in waiting:
                if time.monotonic() - began > service.timeout_s:
                    raise StackError(
                        f"{service.name} was not ready within {service.timeout_s:g} s{self._tail(service)}"
                    )

    def check(self) -> None:
        """Wait a moment; raises StackError for a service that ended, StopRequestedError when the front is gone."""
        if select.select([self._lifeline], [], [], _POLL_S)[0]:
            raise StopRequestedError
        for service, process in self._running:
            if process.poll() is not None:
                raise StackError(f"{service.name} ended with code {process.returncode}{self._tail(service)}")

    def watch(self) -> None:
        """Run until the front is gone (StopRequestedError) or a service ends (StackError)."""
        while True:
            self.check()

    def stop(self) -> None:
        """End the services, the last started first, and whatever they left."""
        for _, process in reversed(self._running):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # to Postgres a fast shutdown, to the others like Ctrl-C
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_GRACE_S)
        self._running.clear()
        end_descendants()

    def _tail(self, service: Service) -> str:
        log = self._logs / f"{service.name}.log"
        return f"; its log {log} ends:\n{log.read_text(encoding='utf-8', errors='replace')[-_LOG_TAIL:]}"


def run_kept(body: Callable[[IO[bytes]], int]) -> int:
    """Run `body(lifeline)` in a keeper until it returns or a signal asks for the end; returns its exit code."""
    adopt_orphans()
    lifeline, held = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(held)
        _keep(lifeline, body)
    os.close(lifeline)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _let_go(held))
    status = _wait(keeper)
    end_descendants()
    return status if status >= 0 else 1


def _keep(lifeline: int, body: Callable[[IO[bytes]], int]) -> None:
    """The keeper's whole life."""
    code = 1
    try:
        os.setsid()
        adopt_orphans()
        with os.fdopen(lifeline, "rb") as stream:
            code = body(stream)
    finally:
        end_descendants(_GRACE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _let_go(held: int) -> None:
    with contextlib.suppress(OSError):
        os.close(held)


def _wait(keeper: int) -> int:
    """The keeper's exit code; orphans that end meanwhile are reaped with it."""
    while True:
        ended, status = os.wait()
        if ended == keeper:
            return os.waitstatus_to_exitcode(status)
