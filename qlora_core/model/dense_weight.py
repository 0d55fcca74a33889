"""The weight that a frozen linear layer stands for, whole. Knows stored 4-bit layers and plain ones."""

import torch
from bitsandbytes.nn.modules import Linear4bit

from qlora_core.quantization.dequantize import dequantize_exact


def dense_weight(module: torch.nn.Module) -> torch.Tensor:
    """A linear layer's weight [out_features, in_features] in float32, or wider if it is stored wider."""
    weight = module.weight
    if isinstance(module, Linear4bit):
        return dequantize_exact(weight.data, weight.quant_state, torch.float32)  # pyright: ignore
    assert isinstance(weight, torch.Tensor)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
