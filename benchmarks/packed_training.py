"""Eight adapters in one pack against the same eight one after another with PEFT, bitsandbytes and its paged AdamW.

Both ways train the same float32 adapters from the same first weights on the same rows in the same order, without
dropout, whose draws differ; their losses are compared first. One thread, CPU time, interleaved by rounds.
"""

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim.adamw import PagedAdamW32bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import timing
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import TokenRow
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.examples import TokenExamples
from qlora_core.training.optimizer import TrialOptimizer
from qlora_core.training.pack.pack import Pack
from qlora_core.training.pass_loop import train_pass
from qlora_core.training.trial import Trial
from qlora_core.training.trial_run import TrialRun

ADAPTERS = 8
TOKENS = (16, 64, 128)
STEPS, ROUNDS = 3, 4
RANKS = (4, 8, 16)
VOCABULARY = 2_000
LOSS_TOLERANCE = 5e-5


def measure() -> dict[str, Any]:
    """CPU and wall seconds of a step of all adapters, by tokens a micro-batch; a lone run; memory; the optimizer."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {
        "adapters": ADAPTERS,
        "steps": STEPS,
        "rounds": ROUNDS,
        "base": "Llama 768/2048, 3 layers",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = _make_base(Path(name))
        for tokens in TOKENS:
            figures[f"{ADAPTERS} x {tokens} tokens"] = _compare(folder, tokens, ADAPTERS)
        figures["1 x 64 tokens"] = _compare(folder, 64, 1)
        figures["memory"] = _memory(folder)
    figures["optimizer step, this base"] = _compare_optimizers(768, 768, 2048, layers=3)
    figures["optimizer step, 8 layers of an 8B model"] = _compare_optimizers(4096, 1024, 14336, layers=8)
    return figures


def _make_base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=12,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    (folder / "plain" / "tokenizer_config.json").write_text("{}")
    quantize_checkpoint(folder / "plain", folder / "nf4", QuantizeConfig())
    return folder / "nf4"


def _rows(seed: int, tokens: int) -> list[TokenRow]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (STEPS, tokens), generator=generator).tolist()
    return [TokenRow(f"{seed}-{number}", row, [True] * tokens) for number, row in enumerate(ids)]


def _trial(number: int, ranks: Sequence[int]) -> Trial:
    params = TrainConfig(
        lora_rank=ranks[number % len(ranks)],
        lora_dropout=0.0,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        seed=number,
        optimizer="adamw",
    )
    return Trial(f"t{number}", params)


class Packed:
    """All trials in one pack, on the base as it loads by default."""

    def __init__(self, folder: Path, tokens: int, count: int, ranks: Sequence[int] = RANKS) -> None:
        base = load_quantized(folder)
        self.pack = Pack(base)
        self.runs = []
        for number in range(count):
            trial = _trial(number, ranks)
            slot = self.pack.fill(lora_config(base, trial.params), trial.params.seed)
            self.runs.append(TrialRun(trial, slot, self.pack.weights(slot), TokenExamples(_rows(number, tokens))))
        self.first = [self._weights(run) for run in self.runs]

    def _weights(self, run: TrialRun) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in run.weights.named()}

    def step(self, number: int) -> None:
        """The next step of every trial; raises what stops one."""
        for _, fault in train_pass(self.pack, self.runs):
            if fault is not None:
                raise fault

    def losses(self) -> list[list[float]]:
        """Nats per trained token of every step so far, by trial."""
        return [[entry["loss"] for entry in run.counters.curve] for run in self.runs]


class OneByOne:
    """Each trial alone: PEFT's LoRA on bitsandbytes' Linear4bit, one model for all so that memory is no matter."""

    def __init__(self, folder: Path, tokens: int, ours: Packed) -> None:
        base = load_quantized(folder, residency="bitsandbytes")
        self.base = base
        self.rows = [_rows(number, tokens) for number in range(len(ours.runs))]
        self.orders = [run._order for run in ours.runs]
        self.model: PeftModel = self._model(base, [run.trial for run in ours.runs])
        self.optimizers = []
        for number, weights in enumerate(ours.first):
            parameters = self._parameters(number)
            for name, value in parameters.items():
                value.data.copy_(weights[name.replace(f".t{number}.", ".")])
            self.optimizers.append(PagedAdamW32bit(list(parameters.values()), lr=1e-3, weight_decay=0.0))
        self.sums: list[list[float]] = [[] for _ in ours.runs]

    def _model(self, base: PreTrainedModel, trials: Sequence[Trial]) -> PeftModel:
        configs = [LoraConfig(r=t.params.lora_rank, lora_alpha=16, target_modules="all-linear") for t in trials]
        model = get_peft_model(base, configs[0], adapter_name="t0")
        for number, config in enumerate(configs[1:], start=1):
            model.add_adapter(f"t{number}", config)
        assert isinstance(model, PeftModel)
        return model.eval()

    def _parameters(self, number: int) -> dict[str, torch.nn.Parameter]:
        named = self.model.named_parameters()
        return {name: value for name, value in named if f".t{number}." in name}

    def step(self, number: int) -> None:
        """The step `number` (from 0) of every trial, one after another."""
        for trial, optimizer in enumerate(self.optimizers):
            self.model.set_adapter(f"t{trial}")
            (index,) = self.orders[trial].batch(number)
            ids = torch.tensor([self.rows[trial][index].input_ids], device=self.base.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = cross_entropy(logits.float(), ids[0, 1:])
            loss.backward()
            self.sums[trial].append(loss.item())
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.3)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
                optimizer.step()
            optimizer.zero_grad()

    def losses(self) -> list[list[float]]:
        """Nats per trained token of every step so far, by trial."""
        return self.sums


def _compare(folder: Path, tokens: int, count: int) -> dict[str, Any]:
    best: dict[str, tuple[float, float]] = {}
    for _ in range(ROUNDS):
        ours = Packed(folder, tokens, count)
        spent = take_turns(ours, OneByOne(folder, tokens, ours), LOSS_TOLERANCE)
        for name, times in spent.items():
            best[name] = min(best.get(name, (1e9, 1e9)), *times)
    return ratios(best)


def take_turns(ours: Packed, peer: OneByOne, tolerance: float) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each step but the first, which allocates; raises AssertionError where losses differ."""
    spent: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for step in range(STEPS):
        for name, way in (("ours", ours), ("peer", peer)):
            spent[name].append(timed(lambda way=way, step=step: way.step(step)))
    for mine, theirs in zip(ours.losses(), peer.losses(), strict=True):
        largest = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
        if not largest <= tolerance:
            raise AssertionError(f"losses differ by {largest}, {tolerance} is rounding")
    return {name: times[1:] for name, times in spent.items()}


def _compare_optimizers(hidden: int, key_value: int, wide: int, layers: int) -> dict[str, Any]:
    """A step over the adapters of Llama layers of these widths at rank 16: one flat buffer against a tensor a time."""
    linears = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden),
               (hidden, wide), (hidden, wide), (wide, hidden)]  # fmt: skip
    shapes = [shape for _ in range(layers) for i, o in linears for shape in ((16, i), (o, 16))]
    count = sum(a * b for a, b in shapes)
    flat = torch.nn.Parameter(torch.zeros(count))
    flat.grad = torch.full_like(flat, 1e-3)
    apart = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in apart:
        parameter.grad = torch.zeros_like(parameter)
    ours = TrialOptimizer({"a": flat}, TrainConfig(optimizer="adamw"))
    peer = PagedAdamW32bit(apart, lr=2e-4)

    def step_peer() -> None:
        peer.step()
        peer.zero_grad(set_to_none=False)  # ours sets gradients to zero in its step

    best: dict[str, tuple[float, float]] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        for _ in range(12):
            for gradient in (flat.grad, *(parameter.grad for parameter in apart)):
                assert gradient is not None
                gradient.fill_(1e-3)
            for name, step in (("ours", lambda: ours.step(2e-4)), ("peer", step_peer)):
                best[name] = min(best.get(name, (1e9, 1e9)), timed(step))
    if not torch.allclose(flat.detach()[: 16 * hidden], apart[0].detach().flatten(), rtol=1e-5, atol=1e-8):
        raise AssertionError("the two optimizers step to different weights")
    return {"parameters": count, **ratios(best)}


_MEMORY_PROGRAM = """
import resource, sys
from pathlib import Path
import benchmarks.packed_training as bench
import torch
torch.set_num_threads(1)
folder, count, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
bench.load_quantized(folder)
ours = bench.Packed(folder, tokens, count)
for step in range(bench.STEPS):
    ours.step(step)
print(bench.peak_bytes())
"""


def peak_bytes() -> int:
    """The most resident memory this process has held; `ru_maxrss` would begin at the peak of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _memory(folder: Path) -> dict[str, Any]:
    """Peak resident memory of 8 x 16 tokens and of 1 x 128, each in a process of its own, over the imports alone."""
    peaks = {}
    for name, count, tokens in (("pack", ADAPTERS, 16), ("alone", 1, 16 * ADAPTERS)):
        command = [sys.executable, "-c", _MEMORY_PROGRAM, str(folder), str(count), str(tokens)]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    floor = "import benchmarks.packed_training as bench; print(bench.peak_bytes())"
    done = subprocess.run([sys.executable, "-c", floor], check=True, capture_output=True, text=True)
    imports = int(done.stdout.split()[-1])
    ratio = (peaks["pack"] - imports) / (peaks["alone"] - imports)
    return {"pack_bytes": peaks["pack"] - imports, "alone_bytes": peaks["alone"] - imports, "ratio": round(ratio, 3)}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of one call, work it left to a GPU included."""

    def whole() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return timing.timed(whole)


def ratios(best: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """The (CPU, wall) seconds of `ours` and `peer` as a record, with the peer's over ours."""
    rows: dict[str, Any] = {
        name: {"cpu_s": round(cpu, 4), "wall_s": round(wall, 4)} for name, (cpu, wall) in best.items()
    }
    rows["ratio_cpu"] = round(best["peer"][0] / best["ours"][0], 2)
    rows["ratio_wall"] = round(best["peer"][1] / best["ours"][1], 2)
    return rows
