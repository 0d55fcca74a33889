"""Exact values of stored 4-bit weights on every device. Knows bitsandbytes' format and operators, and no modules.

bitsandbytes 0.50.2's CPU operator takes every row to start a new block when the CPU has AVX-512: where in_features is a
multiple of 32 but not of the blocksize, blocks cross rows and its values are wrong by 10 to 25 % (relative L2,
measured). Seen as rows of one block each, the same bytes come out right, so that is how they are asked for here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise


def dequantize_exact(codes: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out_features, in_features] that `codes` and `state` stand for, in `dtype`.

    w = code_table[code] * absmax, with absmax = code_table2[q] * absmax2 + mean under double quantization; computed in
    float32 and rounded to `dtype` at the end.
    """
    stored: Any = state  # bitsandbytes leaves the attributes untyped
    absmax = stored.absmax
    if stored.nested:
        absmax = dequantize_blockwise(absmax, stored.state2) + stored.offset
    absmax = absmax.float()
    if codes.device.type != "cpu" or not blocks_cross_rows(state):
        return _dequantize(codes, absmax, stored, stored.shape, dtype)
    flat = codes.reshape(-1)
    blocks, rest = divmod(stored.shape.numel(), stored.blocksize)
    split = blocks * stored.blocksize // 2  # two codes in a byte
    whole = _dequantize(flat[:split], absmax[:blocks], stored, (blocks, stored.blocksize), dtype)
    last = _dequantize(flat[split:], absmax[blocks:], stored, (1, rest), dtype)
    return torch.cat([whole.reshape(-1), last.reshape(-1)]).reshape(stored.shape)


def blocks_cross_rows(state: QuantState) -> bool:
    """Whether a block of the flattened weight can hold the end of one row and the start of the next."""
    stored: Any = state
    return stored.shape[-1] % stored.blocksize != 0


def _dequantize(
    codes: torch.Tensor, absmax: torch.Tensor, state: Any, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    if 0 in shape:
        return torch.empty(0, dtype=dtype, device=codes.device)
    return torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, state.blocksize, state.quant_type, shape, dtype)
