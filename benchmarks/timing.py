"""How long one call takes. Knows nothing of what it does, and no torch."""

import time
from collections.abc import Callable


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this process, all threads, and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall
