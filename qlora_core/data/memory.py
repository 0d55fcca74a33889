"""Keeps what is freed from staying with the process: a step's memory must not come on top of that of the one before.

Arrow's usual allocator (mimalloc) and the C library keep freed memory for later, each for itself: half as much again as
the rows take. Knows nothing of what is stored.
"""

import gc
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


@contextmanager
def collecting_new_only() -> Iterator[None]:
    """Within it, the garbage collector passes over what was there before.

    Making rows sets it off again and again; each time it would look through every object of the libraries, some
    tenths of a second. Does nothing where somebody has frozen objects already.
    """
    frozen = gc.get_freeze_count() > 0
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def return_memory() -> None:
    """Give what was freed back to the system."""
    pa.system_memory_pool().release_unused()
