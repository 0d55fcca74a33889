"""Exact values of stored 4-bit weights on every device. Knows bitsandbytes' format and operators, and no modules.

bitsandbytes 0.50.2's CPU operator takes every row to start a new block when the CPU has AVX-512: where in_features is a
multiple of 32 but not of the blocksize, blocks cross rows and its values are wrong by 10 to 25 % (relative L2,
measured). Seen as rows of one block each, the same bytes come out right, so that is how they are asked for here.
"""

from collections.abc import Sequence

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise

from qlora_core.errors import ModelError


def dequantize_exact(codes: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out_features, in_features] that `codes` and `state` stand for, in `dtype`.

    w = code_table[code] * absmax, with absmax = code_table2[q] * absmax2 + mean under double quantization; computed in
    float32 and rounded to `dtype` at the end.
    """
    absmax: torch.Tensor = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).add_(state.offset)
    absmax = absmax.float()
    if codes.device.type != "cpu" or not blocks_cross_rows(state):
        return _dequantize(codes, absmax, state, _shape(state), dtype)
    flat = codes.reshape(-1)
    blocks, rest = divmod(_shape(state).numel(), state.blocksize)
    split = blocks * state.blocksize // 2  # two codes in a byte
    whole = _dequantize(flat[:split], absmax[:blocks], state, (blocks, state.blocksize), dtype)
    last = _dequantize(flat[split:], absmax[blocks:], state, (1, rest), dtype)
    return torch.cat([whole.reshape(-1), last.reshape(-1)]).reshape(_shape(state))


def blocks_cross_rows(state: QuantState) -> bool:
    """Whether a block of the flattened weight can hold the end of one row and the start of the next."""
    return _shape(state)[-1] % state.blocksize != 0


def _shape(state: QuantState) -> torch.Size:
    if state.shape is None or state.blocksize is None:
        raise ModelError("a quantized weight has no shape or blocksize; quantize the base again")
    return state.shape


def _dequantize(
    codes: torch.Tensor, absmax: torch.Tensor, state: QuantState, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    if 0 in shape:
        return torch.empty(0, dtype=dtype, device=codes.device)
    return torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, state.blocksize, state.quant_type, shape, dtype)
