"""What merging keeps of adapters of a small pretrained model: every way of `qlora merge`, beside PEFT's own.

The base is stories260K in NF4, the adapters are LoRA trained for seconds on answers of dolly, one with a large and one
with a small change to the weights. Gain and KL are per token of held-out answers.
"""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core.adapters.merge import MergeRequest, merge
from qlora_core.config.merge import MergeConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError
from qlora_core.model.base import load_quantized
from qlora_core.model.perplexity import document_losses, encode_documents
from qlora_core.quantization.quantize import quantize_checkpoint

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RUNS = {"large": (80, 3e-3), "small": (8, 2e-4)}
"""Optimizer steps and learning rate."""
_TOKENS = 128
_ROWS = 16
_KEPT = ("gain_retained", "kl", "projection", "top1_agreement", "passed")


def measure_stories() -> dict[str, Any]:
    """By adapter: |delta|/|W|, the gain, what each way keeps of it, and what was chosen; a reason where data lacks."""
    if not SHARED.is_dir():
        return {"skipped": f"the real data is not at {SHARED}"}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        plain, texts = SHARED / "models" / "stories260K-hf", _write_texts(work)
        quantize_checkpoint(plain, work / "nf4", QuantizeConfig())
        return {name: _measure_one(work, plain, texts, name) for name in RUNS}


def _measure_one(work: Path, plain: Path, texts: dict[str, Path], name: str) -> dict[str, Any]:
    steps, rate = RUNS[name]
    adapter = _train(work / "nf4", work / name, texts["train"].read_text(), steps, rate)
    found: dict[str, Any] = {"stock_peft": _stock_gain(work / "nf4", adapter, texts["test"].read_text())}
    for target in ("16bit", "nf4"):
        out = work / f"{name}-{target}"
        request = MergeRequest(adapter, work / "nf4", out, target, plain, texts["test"], texts["calibration"])
        try:
            merge(request, MergeConfig(min_predicted_projection=-1))
            certificate = json.loads((out / "certificate.json").read_text())
        except ModelError:
            certificate = json.loads(out.with_name(f"{out.name}.refused.json").read_text())
        tried = certificate["candidates"]
        found[target] = {each["name"]: {key: each[key] for key in _KEPT} for each in tried}
        found[target]["chosen"] = certificate["chosen"]
        if target == "16bit":
            changes = [(layer["delta_norm"], layer["delta_over_weight"]) for layer in tried[0]["layers"]]
            norms = [sum(value**2 for value in side) for side in zip(*((d, d / r) for d, r in changes), strict=True)]
            found |= {"gain": tried[0]["gain"], "delta_over_weight": (norms[0] / norms[1]) ** 0.5}
    return found


def _write_texts(work: Path) -> dict[str, Path]:
    rows = json.loads((SHARED / "sft" / "dolly_3k.json").read_text())
    answers = [row["output"] for row in rows if 100 < len(row["output"]) < 600]
    random.Random(0).shuffle(answers)
    parts = {"train": answers[:600], "calibration": answers[600:630], "test": answers[630:670]}
    for name, part in parts.items():
        (work / f"{name}.txt").write_text("<|endoftext|>".join(part))
    return {name: work / f"{name}.txt" for name in parts}


def _train(base: Path, folder: Path, text: str, steps: int, rate: float) -> Path:
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    rows = [row for row in encode_documents(tokenizer, text) if len(row) >= _TOKENS]
    model: Any = load_quantized(base, device="cpu", residency="dense")
    made = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([each for each in made.parameters() if each.requires_grad], lr=rate)
    draw = random.Random(1)
    for _ in range(steps):
        ids = torch.tensor([list(row[:_TOKENS]) for row in draw.sample(rows, _ROWS)])
        logits = made(input_ids=ids, use_cache=False).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    made.save_pretrained(str(folder))
    return folder


def _stock_gain(base: Path, adapter: Path, text: str) -> float:
    """The share of the gain that PEFT's own `merge_and_unload` leaves."""

    def loss(model: Any) -> float:
        losses = document_losses(model, encode_documents(AutoTokenizer.from_pretrained(base), text))
        return sum(nats for nats, _ in losses) / sum(count for _, count in losses)

    plain = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}).eval()
    before = loss(plain)
    dynamic = PeftModel.from_pretrained(plain, str(adapter)).eval()
    reached = loss(dynamic)
    return (before - loss(dynamic.merge_and_unload().eval())) / (before - reached)
