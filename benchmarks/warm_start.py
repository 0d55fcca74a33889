"""Loading the stored NF4 checkpoint against quantizing the same base while loading it, as stock transformers does.

Both give a base ready to train over. Logits are compared to the bit first; then the two are timed in turn.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.demo.tokenizer import train_tokenizer
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint

ROUNDS = 5
LAYERS = 8


def measure() -> dict[str, Any]:
    """Median seconds of CPU and wall time of each way, and their ratios (ours in the denominator)."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        base, quantized = Path(folder) / "base", Path(folder) / "nf4"
        parameters = _write_base(base)
        quantized.mkdir()
        quantize_checkpoint(base, quantized, QuantizeConfig())
        ways = {"stored": lambda: load_quantized(quantized), "on_the_fly": lambda: quantize_while_loading(base)}
        _check_equal(ways)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, load in ways.items():
                seconds[name].append(_timed(load))
    medians = {
        name: {"cpu_s": statistics.median(c for c, _ in taken), "wall_s": statistics.median(w for _, w in taken)}
        for name, taken in seconds.items()
    }
    ratios = {unit: medians["on_the_fly"][unit] / medians["stored"][unit] for unit in ("cpu_s", "wall_s")}
    return {"parameters": parameters, "rounds": ROUNDS, "medians": medians, "on_the_fly_over_stored": ratios}


def _write_base(folder: Path) -> int:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a b c"], vocab_size=300, max_tokens=128)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def quantize_while_loading(base: Path) -> PreTrainedModel:
    """The base in NF4 as stock transformers and bitsandbytes make it, in float32 compute."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)


def _check_equal(ways: dict[str, Callable[[], PreTrainedModel]]) -> None:
    tokens = torch.arange(32)[None]
    logits = [load()(tokens).logits for load in ways.values()]
    if not torch.equal(logits[0], logits[1]):
        raise SystemExit(f"the two ways give other logits, by up to {(logits[0] - logits[1]).abs().max():.2e}")


def _timed(load: Callable[[], PreTrainedModel]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    load()
    return time.process_time() - cpu, time.perf_counter() - wall
