"""What a CUDA GPU does with the Llama-3-8B shape and random weights: quantizing, dequantizing, training, memory.

Bounds are the machine's own (reading the files, copying memory), the peer is PEFT on bitsandbytes' Linear4bit with its
paged AdamW in the same process, losses compared first. `make bench-gpu` runs it; the shape and sizes are arguments, so
that the same code can be tried small on a CPU.
"""

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.packed_training import OneByOne, Packed, ratios, take_turns, timed
from benchmarks.random_checkpoint import EIGHT_BILLION, LlamaShape, write_checkpoint
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.config.train import TrainConfig
from qlora_core.model.base import choose_device
from qlora_core.quantization.blockwise import dequantize_into, quantize_tensor
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.training.memory.parts import Workload, training_parts
from qlora_core.training.memory.shapes import read_shapes

RANK = 16
LONG_TOKENS, SHORT_TOKENS, ADAPTERS = 2048, 256, 8
ROUNDS = 10
_READ_BYTES = 16 << 20
# bf16 keeps 8 bits; the two ways add in different orders over all layers
_LOSS_TOLERANCE = {"cuda": 5e-2, "cpu": 5e-5}


def measure(
    shape: LlamaShape = EIGHT_BILLION,
    *,
    long_tokens: int = LONG_TOKENS,
    short_tokens: int = SHORT_TOKENS,
    device: str = "cuda",
) -> dict[str, Any]:
    """Seconds, GB/s, tokens/s, bytes and ratios by part. Raises SystemExit where the device is not there."""
    if choose_device() != device:
        raise SystemExit(f"this benchmark is for {device}, and this machine has {choose_device()}; see tests/gpu too")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    figures: dict[str, Any] = {"device": name, "shape": vars(shape), "rank": RANK}
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        figures["parameters"] = write_checkpoint(folder / "base", shape)
        figures["quantize"] = _quantize(folder)
        figures["dequantize"] = _dequantize(shape, device)
        for tokens, count in ((long_tokens, 1), (short_tokens, ADAPTERS)):
            figures[f"{count} x {tokens} tokens"] = _train(folder / "nf4", tokens, count, device)
            _let_go()
    return figures


def _quantize(folder: Path) -> dict[str, Any]:
    """Reading the checkpoint, then quantizing it, both with its files in the page cache."""
    source = folder / "base"
    _read(source)
    read_s = timed(lambda: _read(source))[1]
    quantize_s = timed(lambda: quantize_checkpoint(source, folder / "nf4", QuantizeConfig()))[1]
    return {"read_s": read_s, "quantize_s": quantize_s, "over_read": quantize_s / read_s}


def _read(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as stream:
            while stream.read(_READ_BYTES):
                pass


def _dequantize(shape: LlamaShape, device: str) -> dict[str, Any]:
    """The largest layer's values into a bf16 buffer, against copying such a buffer: bytes moved a second."""
    weight = torch.randn(shape.intermediate, shape.hidden, dtype=torch.bfloat16, device=device)
    stored = quantize_tensor(weight, type="nf4", blocksize=64, double_quant=True)
    out = torch.empty_like(weight)
    dequantize_s = _least(lambda: dequantize_into(stored, out))
    copy_s = _least(lambda: out.copy_(weight))
    moved = {"dequantize": stored.codes.nbytes + stored.absmax.nbytes + out.nbytes, "copy": 2 * out.nbytes}
    rates = {"dequantize": moved["dequantize"] / dequantize_s, "copy": moved["copy"] / copy_s}
    return {**{f"{way}_gb_per_s": rate / 1e9 for way, rate in rates.items()},
            "of_copy_bandwidth": rates["dequantize"] / rates["copy"]}  # fmt: skip


def _least(work: Callable[[], object]) -> float:
    return min(timed(work)[1] for _ in range(ROUNDS))


def _train(folder: Path, tokens: int, count: int, device: str) -> dict[str, Any]:
    """Tokens a second and the peak of memory of a pack, beside the same trials one by one and the plan's prediction."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ours = Packed(folder, tokens, count, (RANK,))
    ours.step(0)
    measured = torch.cuda.max_memory_allocated() if device == "cuda" else None
    plan = _planned_bytes(folder, tokens * count, device)
    ours = Packed(folder, tokens, count, (RANK,))
    spent = take_turns(ours, OneByOne(folder, tokens, ours), _LOSS_TOLERANCE[device])
    best = {way: min(times, key=lambda pair: pair[1]) for way, times in spent.items()}
    return {
        "tokens_per_s": {way: tokens * count / wall_s for way, (_, wall_s) in best.items()},
        **ratios(best),
        "peak_memory_bytes": measured,
        "planned_bytes": plan,
    }


def _planned_bytes(folder: Path, tokens: int, device: str) -> int:
    """What the plan says of one trial with that many tokens in a pass, without the margin between tensors."""
    params = TrainConfig(lora_rank=RANK, micro_batch_size=1, gradient_accumulation_steps=1, optimizer="adamw")
    item_bytes = 2 if device == "cuda" else 4
    work = Workload(params, QuantizeConfig(), tokens, 8)
    parts = training_parts(read_shapes(folder), work, "dense", item_bytes, device)
    return parts.total_bytes - parts.margin_bytes


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
