"""Eight adapters' answers in one batch over the base, against one adapter after another, on the quantized base.

All sides are given the same prompts, one per adapter, and the same greedy decoding; prompts have one length and answers
no early end, so that every side makes the same number of tokens. The others are stock PEFT with one adapter switched on
at a time and a batch of one row, ours one adapter at a time, and PEFT's own mixed batch (`adapter_names`). There are no
figures unless all sides give the same tokens.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.demo.tokenizer import train_tokenizer
from qlora_core.model.adapter_set import AdapterSet, NamedAdapter, attached_adapters
from qlora_core.model.base import load_quantized
from qlora_core.model.greedy import continue_greedily
from qlora_core.quantization.quantize import quantize_checkpoint

ADAPTERS = 8
RANKS = (4, 8, 16)
PROMPT_TOKENS = 24
NEW_TOKENS = 32
ROUNDS = 5
RESIDENCIES = ("scratch", "dense")
_NO_STOP = -1

Tokens = list[list[int]]


def measure() -> dict[str, Any]:
    """Per residency of the base: tokens per second of CPU and wall time of each side, and ratios (ours over theirs)."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.compiler.set_stance("force_eager"):
        quantized = Path(folder) / "nf4"
        write_base(Path(folder) / "base", quantized)
        adapters = [write_adapter(quantized, Path(folder), number) for number in range(ADAPTERS)]
        figures = {residency: _race(quantized, adapters, residency) for residency in RESIDENCIES}
    return {
        "package_peft": version("peft"),
        "adapters": ADAPTERS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
        "residency": figures,
    }


def _race(quantized: Path, adapters: list[NamedAdapter], residency: str) -> dict[str, Any]:
    seconds: dict[str, list[tuple[float, float]]] = {}
    with _ways(quantized, adapters, residency) as ways:
        given = {name: answer() for name, answer in ways.items()}
        other = [name for name, tokens in given.items() if tokens != given["one_batch"]]
        if other:
            raise SystemExit(f"with residency {residency}, {', '.join(other)} give other tokens than one batch of ours")
        for _ in range(ROUNDS):
            for name, answer in ways.items():
                seconds.setdefault(name, []).append(_timed(answer))
    made = ADAPTERS * NEW_TOKENS
    rates = {
        name: {
            "tokens_per_cpu_s": made / statistics.median(cpu for cpu, _ in taken),
            "tokens_per_wall_s": made / statistics.median(wall for _, wall in taken),
        }
        for name, taken in seconds.items()
    }
    ratios = {
        name: {unit: rates["one_batch"][unit] / rate[unit] for unit in rate}
        for name, rate in rates.items()
        if name != "one_batch"
    }
    return {"rates": rates, "one_batch_over": ratios, "seconds": seconds}


@contextmanager
def _ways(quantized: Path, adapters: list[NamedAdapter], residency: str) -> Iterator[dict[str, Callable[[], Tokens]]]:
    prompts = torch.randint(3, 300, (ADAPTERS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    names = [adapter.name for adapter in adapters]
    stock: Any = _load_stock(quantized, adapters, residency)
    base = load_quantized(quantized, device="cpu", residency=residency)

    def stock_alone() -> Tokens:
        answers: Tokens = []
        for place, name in enumerate(names):
            stock.set_adapter(name)
            answers += _answer(stock.get_base_model(), prompts[place : place + 1], None)
        return answers

    def stock_mixed() -> Tokens:
        # What PEFT's generate does with adapter_names; our loop on both sides, so that the layers are compared
        with torch.inference_mode(), stock.base_model._enable_peft_forward_hooks(adapter_names=names):
            return _answer(stock.get_base_model(), prompts, None)

    with attached_adapters(base, adapters) as attached:

        def ours_alone() -> Tokens:
            answers: Tokens = []
            for place, name in enumerate(names):
                with attached.rows([name]):
                    answers += _answer(base, prompts[place : place + 1], attached)
            return answers

        def ours() -> Tokens:
            with attached.rows(names):
                return _answer(base, prompts, attached)

        yield {"one_batch": ours, "peft_mixed_batch": stock_mixed, "peft_in_turn": stock_alone, "in_turn": ours_alone}


def _answer(model: Any, prompts: torch.Tensor, adapters: AdapterSet | None) -> Tokens:
    return continue_greedily(
        model,
        prompts,
        torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        stop_token_id=_NO_STOP,
        on_keep=adapters.keep if adapters else lambda places: None,
    )


def _load_stock(quantized: Path, adapters: list[NamedAdapter], residency: str) -> PeftModel:
    base = load_quantized(quantized, device="cpu", residency=residency)
    model = PeftModel.from_pretrained(base, str(adapters[0].folder), adapter_name=adapters[0].name)
    for adapter in adapters[1:]:
        model.load_adapter(str(adapter.folder), adapter_name=adapter.name)
    return model.eval()


def write_base(plain: Path, quantized: Path) -> None:
    """A random Llama of 3 layers, 768 wide, and its NF4 checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=12,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(plain)
    train_tokenizer(["a b c"], vocab_size=300, max_tokens=128).save_pretrained(plain)
    quantized.mkdir()
    quantize_checkpoint(plain, quantized, QuantizeConfig())


def write_adapter(quantized: Path, folder: Path, number: int) -> NamedAdapter:
    """A random adapter of it; ranks differ from number to number."""
    torch.manual_seed(number)
    rank = RANKS[number % len(RANKS)]
    settings = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_quantized(quantized, device="cpu"), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapter = NamedAdapter(f"adapter_{number}", folder / f"adapter_{number}")
    model.save_pretrained(str(adapter.folder))
    return adapter


def _timed(answer: Callable[[], Tokens]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    answer()
    return time.process_time() - cpu, time.perf_counter() - wall
