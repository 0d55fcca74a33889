"""Merging on a small pretrained model: 16 bit keeps a light tune, NF4 loses it, and stock PEFT does not say so."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
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

pytestmark = pytest.mark.integration
TOKENS = 64


@pytest.fixture(scope="module")
def light(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The NF4 base, an adapter that learned answers of dolly for a few steps at a small rate, and held-out answers."""
    folder = tmp_path_factory.mktemp("stories")
    quantize_checkpoint(shared_data / "models" / "stories260K-hf", folder / "nf4", QuantizeConfig())
    rows = json.loads((shared_data / "sft" / "dolly_3k.json").read_text())
    answers = [row["output"] for row in rows if 100 < len(row["output"]) < 400]
    (folder / "test.txt").write_text("<|endoftext|>".join(answers[400:420]))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "nf4")
    training = [ids for ids in encode_documents(tokenizer, "<|endoftext|>".join(answers[:400])) if len(ids) >= TOKENS]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base: Any = load_quantized(folder / "nf4", device="cpu", residency="dense")
        made = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([each for each in made.parameters() if each.requires_grad], lr=2e-4)
        for draw in (random.Random(step) for step in range(10)):
            ids = torch.tensor([list(row[:TOKENS]) for row in draw.sample(training, 16)])
            logits = made(input_ids=ids, use_cache=False).logits[:, :-1]
            cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    made.save_pretrained(str(folder / "light"))
    return folder / "nf4", folder / "light", folder / "test.txt"


def test_a_light_tune_of_a_pretrained_model_is_kept_at_16_bit_and_refused_at_nf4(
    light: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, text = light
    kept = merge(MergeRequest(adapter, base, tmp_path / "wide", "16bit", text=text), MergeConfig())
    assert kept["gain"] > 0.01 and kept["gain_retained"] >= 0.999
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32).eval()
    assert loss(stock, base, text) == pytest.approx(kept["loss"]["merged"], abs=1e-4)

    config = MergeConfig(candidates=["dequantized-rtn"], min_predicted_projection=-1)
    with pytest.raises(ModelError, match=r"gain retained -?0\.\d+ is under 0\.97"):
        merge(MergeRequest(adapter, base, tmp_path / "narrow", "nf4", text=text), config)
    assert not (tmp_path / "narrow").exists()
    (tried,) = json.loads((tmp_path / "narrow.refused.json").read_text())["candidates"]
    assert tried["gain_retained"] < 0.1

    # negative control: PEFT merges without a word, and the tune is gone
    plain = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}).eval()
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().eval()
    left = (kept["loss"]["base"] - loss(merged, base, text)) / kept["gain"]
    assert left < 0.3


def loss(model: Any, tokenizer: Path, text: Path) -> float:
    losses = document_losses(model, encode_documents(AutoTokenizer.from_pretrained(tokenizer), text.read_text()))
    return sum(nats for nats, _ in losses) / sum(count for _, count in losses)
