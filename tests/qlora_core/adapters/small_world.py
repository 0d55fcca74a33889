"""A small world to measure adapters in: a Llama trained for seconds on one language, adapters on its kindred ones.

A language is a random table of next-token probabilities over pairs of tokens' residues; a kindred language shares most
of it. So held-out loss has a known floor and an adapter has something real to learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.model.adapter import Golden, golden_logits, write_golden
from qlora_core.model.base import load_quantized

WORDS = 64
LENGTH = 24


@dataclass(frozen=True)
class Language:
    """Next-word probabilities [words, words] by the word before."""

    table: torch.Tensor

    def mixed(self, other: "Language", share: float) -> "Language":
        """The language that speaks like `other` in `share` of its steps."""
        return Language((1 - share) * self.table + share * other.table)

    def rows(self, count: int, seed: int) -> torch.Tensor:
        """Token ids [count, LENGTH]."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(3, WORDS, (count, 1), generator=generator)
        for _ in range(LENGTH - 1):
            rows = torch.cat([rows, torch.multinomial(self.table[rows[:, -1]], 1, generator=generator)], dim=1)
        return rows

    def text(self, count: int, seed: int) -> str:
        """The rows as the words of `save_tokenizer`, documents apart."""
        return "<|endoftext|>".join(" ".join(f"w{token}" for token in row) for row in self.rows(count, seed).tolist())


def language(seed: int, sharpness: float = 2.0) -> Language:
    """A random language; words 0 to 2 are never said."""
    logits = sharpness * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed))
    logits[:, :3] = -torch.inf
    return Language(logits.softmax(-1))


def train_base(folder: Path, spoken: Language, steps: int = 200) -> None:
    """Train a two-layer Llama on `spoken` and save it as a plain checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1,
                eos_token_id=2,
            )
        )  # fmt: skip
    _train(model, spoken, steps, rate=3e-3, parameters=list(model.parameters()))
    model.save_pretrained(folder)


def train_adapter(
    base: Path,
    folder: Path,
    spoken: Language,
    *,
    steps: int,
    rate: float,
    under: Sequence[Path] = (),
    seed: int = 1,
    **settings: Any,
) -> Path:
    """Train LoRA on all linear layers over the 4-bit base and `under`, which stays as it is; save it as PEFT does."""
    from qlora_core.adapters.on_base import attach_stack

    model: Any = load_quantized(base, device="cpu", residency="dense")
    wanted = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if under:
            made: Any = attach_stack(model, under)
            made.add_adapter("new", wanted)
            made.base_model.set_adapter([*made.active_adapters, "new"])
        else:
            made = get_peft_model(model, wanted, adapter_name="new")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(".new." in name)
    _train(made, spoken, steps, rate, [p for p in made.parameters() if p.requires_grad])
    made.save_pretrained(str(folder), selected_adapters=["new"])
    for path in (folder / "new").iterdir():
        path.rename(folder / path.name)
    (folder / "new").rmdir()
    prompts = [row[:3] for row in spoken.rows(3, 7).tolist()]
    write_golden(folder, Golden(prompts, golden_logits(made, prompts)))
    return folder


def loss_on(model: Any, rows: torch.Tensor) -> float:
    """Mean nats per predicted token."""
    with torch.inference_mode():
        return _loss(model, rows).item()


def _train(model: Any, spoken: Language, steps: int, rate: float, parameters: list[torch.nn.Parameter]) -> None:
    rows = spoken.rows(32 * steps, 99)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    for batch in rows.split(32):
        _loss(model, batch).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))
