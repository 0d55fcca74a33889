"""A stored weight's values a few rows or columns at a time, in a buffer so small that it stays in the cache (CPU).

Knows stored tensors, and no products or layers.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from qlora_core.errors import ModelError
from qlora_core.quantization import kernels
from qlora_core.quantization.blockwise import QuantizedTensor, absmax_constants
from qlora_core.quantization.codebooks import codebook

Axis = Literal["rows", "columns"]


class Panel(NamedTuple):
    """Rows or columns `start` to `stop` of a weight; `values` is [stop - start, in] or [out, stop - start]."""

    start: int
    stop: int
    values: torch.Tensor


def has_panels(stored: QuantizedTensor) -> bool:
    """Whether `panels` can be had of it: a matrix on the CPU, its rows whole runs of 64 codes."""
    is_matrix = len(stored.shape) == 2 and stored.shape[1] % kernels.UNPACKED == 0
    return is_matrix and stored.codes.device.type == "cpu"


def panels(stored: QuantizedTensor, axis: Axis, size: int, buffer: torch.Tensor) -> Iterator[Panel]:
    """Every panel of `size` rows or columns in order, each written over the one before; the last has up to 2 size - 1.

    `size` is a multiple of 64, so that rows begin with a block whatever the blocksize. `buffer`: contiguous, float32,
    of at least as many elements as the largest panel. Values are those of `dequantize_into`.

    Raises:
        ModelError: `has_panels` says no, the size is no multiple of 64, or the buffer does not fit.
    """
    if not has_panels(stored) or size < 1 or size % kernels.UNPACKED:
        raise ModelError(
            f"a weight of shape {list(stored.shape)} on {stored.codes.device} has no panels of {size} {axis}; rows "
            f"must be multiples of {kernels.UNPACKED} wide, and the size too"
        )
    rows, width = stored.shape
    fill = _filler(stored, axis)
    total, across = (rows, width) if axis == "rows" else (width, rows)
    count = max(total // size, 1)
    bounds = [*(size * place for place in range(count)), total]
    most = (bounds[-1] - bounds[-2]) * across
    if buffer.dtype != torch.float32 or not buffer.is_contiguous() or buffer.numel() < most:
        raise ModelError(
            f"a buffer of {buffer.numel()} {buffer.dtype} values cannot hold panels of {most}; give a contiguous one "
            f"of {most} torch.float32 values"
        )
    for start, stop in pairwise(bounds):
        part = buffer.view(-1)[: (stop - start) * across]
        fill(start, stop, part.numpy())
        yield Panel(start, stop, part.view((stop - start, width) if axis == "rows" else (rows, stop - start)))


def _filler(stored: QuantizedTensor, axis: Axis) -> Callable[[int, int, np.ndarray], None]:
    """Writes the values of rows or columns `start` to `stop` into a flat array."""
    codes, table = stored.codes.numpy().reshape(-1), codebook(stored.type).values
    scales, width, size = absmax_constants(stored).numpy(), stored.shape[1], stored.blocksize

    def fill_rows(start: int, stop: int, out: np.ndarray) -> None:
        part, blocks = slice(start * width // 2, stop * width // 2), slice(start * width // size, None)
        kernels.dequantize_blocks(codes[part], scales[blocks], table, size, 0, -(-len(out) // size), out)

    def fill_columns(start: int, stop: int, out: np.ndarray) -> None:
        kernels.dequantize_columns(codes, scales, table, size.bit_length() - 1, width, start, stop, out)

    return fill_rows if axis == "rows" else fill_columns
