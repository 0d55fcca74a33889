"""The CPU kernels of 4-bit quantization beside bitsandbytes' CPU operators, one thread each.

Both get the same weights and must give the same codes, constants and values to the bit before anything is timed. NF4
with double quantization at blocksize 64. bitsandbytes is called as its users call it: `quantize_4bit`, and
`dequantize_4bit`, which makes a new tensor each time; ours restores into a buffer that is used again. How much of the
second ratio is the new tensor depends on its size: memory for large ones comes fresh from the kernel.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, from_bitsandbytes, quantize_tensor

ROUNDS = 15
SHAPES = ((4096, 4096), (1024, 1024))
DTYPES = (torch.float32, torch.bfloat16)


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Of each shape, dtype and direction: the best seconds of each side over rounds in turn, their ratios, our rate."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"rounds": rounds, "threads": 1, "type": "nf4", "blocksize": 64, "double_quant": True}
    for shape in SHAPES:
        for dtype in DTYPES:
            weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
            name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
            figures[name] = _compare(weight, rounds)
    return figures


def _compare(weight: torch.Tensor, rounds: int) -> dict[str, Any]:
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored, buffer = _ours(weight), torch.empty_like(weight)
    _check_equal(stored, from_bitsandbytes(codes, state))
    if not torch.equal(dequantize_into(stored, buffer, threads=1), dequantize_4bit(codes, state)):
        raise SystemExit("the two sides restore other values")
    return {
        "quantize": _race(
            {
                "ours": lambda: _ours(weight),
                "bitsandbytes": lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True),
            },
            weight.numel(),
            rounds,
        ),
        "dequantize": _race(
            {
                "ours": lambda: dequantize_into(stored, buffer, threads=1),
                "bitsandbytes": lambda: dequantize_4bit(codes, state),
            },
            weight.numel(),
            rounds,
        ),
    }


def _ours(weight: torch.Tensor) -> QuantizedTensor:
    return quantize_tensor(weight, type="nf4", blocksize=64, double_quant=True, threads=1)


def _check_equal(ours: QuantizedTensor, theirs: QuantizedTensor) -> None:
    if ours.nested_absmax is None or theirs.nested_absmax is None or ours.offset != theirs.offset:
        raise SystemExit("the two sides quantize the absmax constants differently")
    for part in ("codes", "absmax", "nested_absmax"):
        if not torch.equal(getattr(ours, part), getattr(theirs, part)):
            raise SystemExit(f"the two sides give other {part}")


def _race(ways: dict[str, Callable[[], Any]], elements: int, rounds: int) -> dict[str, Any]:
    best = {name: {"cpu_s": float("inf"), "wall_s": float("inf")} for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            taken = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
            best[name] = {unit: min(best[name][unit], taken[unit]) for unit in taken}
    return {
        "best": best,
        "bitsandbytes_over_ours": {unit: best["bitsandbytes"][unit] / best["ours"][unit] for unit in best["ours"]},
        "ours_million_weights_per_cpu_s": elements / best["ours"]["cpu_s"] / 1e6,
    }
