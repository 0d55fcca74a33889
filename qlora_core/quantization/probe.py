"""A small round trip through the 4-bit kernels of this machine. Knows nothing of checkpoints."""

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.quantization.blockwise import dequantize_into, quantize_tensor
from qlora_core.quantization.own_types import OWN_TYPES


def probe_kernels(config: QuantizeConfig, device: str) -> float:
    """Relative L2 error of quantizing and restoring 256 x 256 normal weights: near .092 for NF4 at blocksize 64.

    nf4 and fp4 go through bitsandbytes' kernels on `device`, which run such checkpoints; the other types through ours
    on the CPU. Raises whatever the kernels raise where they do not work: RuntimeError or ImportError.
    """
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    if config.type in OWN_TYPES:
        stored = quantize_tensor(
            weights, type=config.type, double_quant=config.double_quant, blocksize=config.blocksize
        )
        restored = dequantize_into(stored, torch.empty_like(weights))
    else:
        weights = weights.to(device)
        codes, state = quantize_4bit(
            weights, compress_statistics=config.double_quant, quant_type=config.type, blocksize=config.blocksize
        )
        restored = dequantize_4bit(codes, state)
    return float(torch.linalg.vector_norm(restored - weights) / torch.linalg.vector_norm(weights))
