"""A Linear4bit whose values do not depend on the CPU it runs on. Knows nothing of how it came to be quantized."""

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit
from torch.nn.functional import linear

from qlora_core.quantization.dequantize import dequantize_exact


class ExactLinear4bit(Linear4bit):
    """y = x W^T + bias with W from `dequantize_exact`, for layers whose blocks cross rows (see that module)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] in any float dtype; returns [..., out_features] in the same. W is frozen."""
        weight: Any = self.weight
        bias = self.bias
        dtype = self.compute_dtype or x.dtype
        y = _FrozenLinear.apply(x.to(dtype), weight.data, weight.quant_state)
        return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


class _FrozenLinear(torch.autograd.Function):
    """Dequantizes again for the backward pass, so that no full-size weight is kept between the two."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, state: QuantState) -> torch.Tensor:
        ctx.codes, ctx.state, ctx.dtype = codes, state, x.dtype
        return linear(x, dequantize_exact(codes, state, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight = dequantize_exact(ctx.codes, ctx.state, ctx.dtype)
        return torch.matmul(gradients[0].to(ctx.dtype), weight), None, None
