"""Exact values of stored 4-bit weights on every device. Knows bitsandbytes' format and operators, and no modules.

bitsandbytes 0.50.2's CPU operator takes every row to start a new block when the CPU has AVX-512: where in_features is a
multiple of 32 but not of the blocksize, blocks cross rows and its values are wrong by 10 to 25 % (relative L2,
measured). On the CPU our own kernel takes its place.
"""

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise

from qlora_core.quantization.blockwise import dequantize_into, from_bitsandbytes


def dequantize_exact(codes: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out_features, in_features] that `codes` and `state` stand for, in `dtype`.

    w = code_table[code] * absmax, with absmax = code_table2[q] * absmax2 + mean under double quantization; computed in
    float32 and rounded to `dtype` at the end.
    """
    stored: Any = state  # bitsandbytes leaves the attributes untyped
    if codes.device.type == "cpu":
        return dequantize_into(from_bitsandbytes(codes, state), torch.empty(stored.shape, dtype=dtype))
    absmax = stored.absmax
    if stored.nested:
        absmax = dequantize_blockwise(absmax, stored.state2) + stored.offset
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax.float(), stored.blocksize, stored.quant_type, stored.shape, dtype
    )


def blocks_cross_rows(state: QuantState) -> bool:
    """Whether a block of the flattened weight can hold the end of one row and the start of the next."""
    stored: Any = state
    return stored.shape[-1] % stored.blocksize != 0
