"""Products of few rows with a stored weight, panel by panel through a buffer that stays in the processor's cache.

A weight that is dequantized whole goes to memory and comes back, which with few rows takes as long as the products. A
panel of 256 rows (for x W^T) or columns (for dy W) is multiplied where it was written. Each number is still one sum
over the same values. That the library adds them up in the same order is not promised by anyone, so it is tried: once
for every shape and number of rows, on random input, before panels are used. Where a bit differs they are not.

Knows stored tensors and products; knows no layers.
"""

import torch
from torch.nn.functional import linear

from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into
from qlora_core.quantization.panels import Axis, has_panels, panels

PANEL = 256
"""Rows or columns at a time. With 64 and 128 MKL chose other kernels for a panel than for the whole, and other bits."""

LEAST_ELEMENTS = 1 << 20
MOST_ROWS = 128
"""From 256 rows on the products take so long that panels gain nothing (4096 x 4096, measured)."""

_agreed: dict[tuple[Axis, int, int, int], bool] = {}


def uses_panels(stored: QuantizedTensor, x: torch.Tensor, axis: Axis, buffer: torch.Tensor) -> bool:
    """Whether the product of `x` [..., in or out] is to be taken by panels: gainful, and the same to the bit.

    In float32 on the CPU, for one thread: several would share out each panel anew. Only of an `x` without gaps, as it
    was tried. `buffer`: as large as the weight.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if x.dtype != torch.float32 or not 0 < rows <= MOST_ROWS or torch.get_num_threads() != 1:
        return False
    if not x.is_contiguous() or not has_panels(stored) or stored.shape[0] * stored.shape[1] < LEAST_ELEMENTS:
        return False
    out, width = stored.shape
    key = (axis, out, width, rows)
    if key not in _agreed:
        _agreed[key] = _agree(stored, rows, axis, buffer)
    return _agreed[key]


def product(
    x: torch.Tensor, stored: QuantizedTensor, axis: Axis, buffer: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias by rows of W, [..., out], or x W by its columns, [..., in]; `buffer` is written over."""
    y = x.new_empty(*x.shape[:-1], stored.shape[0 if axis == "rows" else 1])
    for start, stop, values in panels(stored, axis, PANEL, buffer):
        own_bias = None if bias is None else bias[start:stop]
        part = linear(x, values, own_bias) if axis == "rows" else torch.matmul(x, values)
        y[..., start:stop] = part
    return y


def _agree(stored: QuantizedTensor, rows: int, axis: Axis, buffer: torch.Tensor) -> bool:
    """Whether the panels' product has the bits of the whole weight's, with a bias and without."""
    out, width = stored.shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width if axis == "rows" else out, generator=generator)
    biases = [None, torch.randn(out, generator=generator)] if axis == "rows" else [None]
    found = [product(x, stored, axis, buffer, bias) for bias in biases]
    weight = dequantize_into(stored, buffer[: out * width].view(out, width))
    whole = [linear(x, weight, bias) if axis == "rows" else torch.matmul(x, weight) for bias in biases]
    return all(torch.equal(*pair) for pair in zip(found, whole, strict=True))
