"""How many calls may be in flight, and when the next may start; and an event loop of its own to make them in.

Knows nothing of what is called. Additive increase, multiplicative decrease: each refusal for the rate halves the calls
allowed at once, each success adds a share of one, up to the limit.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple


class Pace:
    """Slots for calls of one event loop; all wait together where the server asked for a pause."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._allowed = float(limit)
        self._busy = 0
        self._resume_at_s = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def allowed(self) -> int:
        """Calls allowed in flight now, at least 1."""
        return max(1, int(self._allowed))

    async def enter(self) -> None:
        """Wait for a slot and for the end of a pause; each return must be followed by one `leave`."""
        while True:
            pause_s = self._resume_at_s - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            elif self._busy < self.allowed:
                self._busy += 1
                return
            else:
                waiter = asyncio.get_running_loop().create_future()
                self._waiting.append(waiter)
                await waiter

    def leave(self) -> None:
        """Give the slot back."""
        self._busy -= 1
        self._wake()

    def slow_down(self, pause_s: float | None) -> None:
        """The server refused for its rate: fewer calls at once, and none before `pause_s` seconds have passed."""
        self._allowed = max(1.0, self._allowed / 2)
        if pause_s is not None:
            self._resume_at_s = max(self._resume_at_s, time.monotonic() + pause_s)

    def went_well(self) -> None:
        """A call succeeded: one more at once after as many successes as are allowed now."""
        self._allowed = min(float(self._limit), self._allowed + 1.0 / self._allowed)
        self._wake()

    def _wake(self) -> None:
        free = self.allowed - self._busy
        while free > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # a cancelled waiter wants no slot
                waiter.set_result(None)
                free -= 1


HELD_S = 0.05


class _Failed(NamedTuple):
    error: BaseException


class _End(NamedTuple):
    pass


Emit = Callable[[Any], None]


def stream_from_loop(produce: Callable[[Emit, asyncio.Event], Awaitable[None]]) -> Generator[Any, None, None]:
    """Yield what `produce(emit, stop)` emits on an event loop in a thread of its own; its exception is raised here.

    A thread, since the caller may be inside an event loop already, and since Ctrl-C then ends the waiting and not the
    calls: closing the generator sets `stop` and waits for `produce` to end.
    """
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    started: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        held: list[Any] = []

        def flush() -> None:
            batch = held.copy()
            held.clear()
            items.put(batch)

        def emit(item: Any) -> None:
            if not held:
                loop.call_later(HELD_S, flush)  # waking the other thread for every item would slow the calls
            held.append(item)

        started.put((loop, stop))
        try:
            await produce(emit, stop)
        finally:
            flush()

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            items.put(_Failed(error))
        finally:
            items.put(_End())

    thread = threading.Thread(target=body, name="judge", daemon=True)
    thread.start()
    loop, stop = started.get()
    try:
        while not isinstance(batch := items.get(), _End):
            if isinstance(batch, _Failed):
                raise batch.error
            yield from batch
    finally:
        if thread.is_alive() and not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop closed in between: nothing is left to stop
                loop.call_soon_threadsafe(stop.set)
        thread.join()
