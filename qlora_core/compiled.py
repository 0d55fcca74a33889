"""Functions compiled by numba, their machine code kept where there is a folder for it. Knows nothing of their work."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` by numba, without the interpreter's lock; `options` are njit's own."""
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # there is no folder that may be written to: every process compiles for itself
        return njit(nogil=True, **options)(function)
