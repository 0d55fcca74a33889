"""Keeps what is freed from staying with the process: a step's memory must not come on top of that of the one before.

Arrow's usual allocator (mimalloc) and the C library keep freed memory for later, each for itself: half as much again as
the rows take. Knows nothing of what is stored.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


@contextmanager
def arrow_on_system_memory() -> Iterator[None]:
    """Within it, Arrow takes its memory from the C library, like all else; afterwards from where it did before."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def return_memory() -> None:
    """Give what was freed back to the system."""
    pa.system_memory_pool().release_unused()
