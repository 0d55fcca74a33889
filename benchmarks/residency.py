"""A 4096 x 4096 NF4 layer, forward and backward, in each residency against bitsandbytes' own layer; and loading it all.

Outputs and gradients, and the logits of the loaded models, are compared to the bit first; then the ways take turns.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.warm_start import quantize_while_loading
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.demo.tokenizer import train_tokenizer
from qlora_core.model.base import load_quantized
from qlora_core.model.residency.layers import set_residency
from qlora_core.quantization.quantize import quantize_checkpoint

WIDTH = 4096
ROWS = (16, 64, 256, 1024)
ROUNDS = 15
LOAD_ROUNDS = 3
WAYS = ("dense", "scratch")


def measure() -> dict[str, Any]:
    """CPU milliseconds a pass by rows, CPU seconds a load, and the ratios (ours in the denominator)."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    layers = _layers()
    return {
        "width": WIDTH,
        "rounds": ROUNDS,
        "forward_backward": {str(rows): _measure_rows(layers, rows) for rows in ROWS},
        "load": _measure_load(),
    }


def _layers() -> dict[str, Any]:
    make: Any = Params4bit
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    stock: Any = Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    stock.weight = make(weight, requires_grad=False, quant_type="nf4", module=stock).to("cpu")
    layers = {"bitsandbytes": stock}
    for way in WAYS:
        layers[way] = copy.deepcopy(stock)
        set_residency(layers[way], way, torch.float32)
    return layers


def _measure_rows(layers: dict[str, Any], rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)
    x, upstream = torch.randn(2, rows, WIDTH, generator=generator)
    x.requires_grad_()

    def train(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y = layer(x)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        return y.detach(), gradient

    expected = train(layers["bitsandbytes"])
    for way in WAYS:
        if not all(torch.equal(*pair) for pair in zip(train(layers[way]), expected, strict=True)):
            raise SystemExit(f"{way} gives other bits than bitsandbytes at {rows} rows")
    return _compare({way: lambda layer=layer: train(layer) for way, layer in layers.items()}, ROUNDS, "ms", 1e3)


def _measure_load() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        base, quantized = Path(folder) / "base", Path(folder) / "nf4"
        parameters = _write_base(base)
        quantize_checkpoint(base, quantized, QuantizeConfig())
        ways: dict[str, Callable[[], Any]] = {
            way: lambda way=way: load_quantized(quantized, precision="float32", residency=way) for way in WAYS
        }
        ways["bitsandbytes"] = lambda: quantize_while_loading(base)
        tokens = torch.arange(32)[None]
        logits = [load()(tokens).logits for load in ways.values()]
        if not all(torch.equal(found, logits[-1]) for found in logits):
            raise SystemExit("the loaded models give other logits than the one that was quantized while loading")
        del logits
        return {"parameters": parameters, "rounds": LOAD_ROUNDS, **_compare(ways, LOAD_ROUNDS, "s", 1.0)}


def _write_base(folder: Path) -> int:
    tokenizer = train_tokenizer(["a b c"], vocab_size=300, max_tokens=128)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=12,
            num_attention_heads=16,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _compare(ways: dict[str, Callable[[], Any]], rounds: int, unit: str, scale: float) -> dict[str, Any]:
    """Least and median CPU time of each way, taken in turn, and bitsandbytes' over ours."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            started = time.process_time()
            run()
            taken[way].append((time.process_time() - started) * scale)
    least = {way: min(times) for way, times in taken.items()}
    medians = {way: statistics.median(times) for way, times in taken.items()}
    return {
        f"least_cpu_{unit}": least,
        f"median_cpu_{unit}": medians,
        "bitsandbytes_over": {way: least["bitsandbytes"] / least[way] for way in WAYS},
        "bitsandbytes_over_in_medians": {way: medians["bitsandbytes"] / medians[way] for way in WAYS},
    }
