"""Packs over tiny random models of each family: rows end to end give the losses and gradients of each adapter alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from qlora_core.data.dataset import TokenRow
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.batches import trained_tokens
from qlora_core.training.pack.layout import Part
from qlora_core.training.pack.pack import Pack
from qlora_core.training.trial import Trial

Rows = Callable[..., list[TokenRow]]
Trials = Callable[..., Trial]

_SIZES: Any = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 48,
}  # fmt: skip
_GROUPED: Any = _SIZES | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "mistral, a window shorter than rows": MistralConfig(**_GROUPED, sliding_window=6),
    "qwen2, biases": Qwen2Config(**_SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**_GROUPED),
    "gemma": GemmaConfig(**_GROUPED),
    "gemma2, capped scores": Gemma2Config(**_GROUPED, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**_GROUPED, sliding_window=6, query_pre_attn_scalar=8),
    "gpt-neox, biases": GPTNeoXConfig(**_SIZES),
}


def _base(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        # Capped scores are known to eager attention alone
        kind = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kind)
    return model.double().eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_computes_what_each_adapter_alone_on_padded_rows_computes(
    family: str, rows: Rows, trial: Trials
) -> None:
    base = _base(FAMILIES[family])
    params = [trial(lora_rank=2 + number, lora_dropout=0.2 * number, seed=number).params for number in range(3)]
    parts = [Part(number, rows(2, seed=number, shortest=9), 0, 4) for number in range(3)]
    counts = [sum(trained_tokens(row) for row in part.rows) for part in parts]
    together = Pack(base)
    assert together.end_to_end
    for number, own in enumerate(params):
        slot = together.fill(lora_config(base, own), own.seed)
        assert slot == number
        _randomize(together, slot)
    sums = together.backward(parts, counts)
    gradients = {n: p.grad.clone() for n, p in _flat(together, 3) if p.grad is not None}
    for slot in range(3):
        together.free(slot)
    for number, own in enumerate(params):
        alone = Pack(base)
        alone.end_to_end = False  # the model's own attention, its own mask
        slot = alone.fill(lora_config(base, own), own.seed)
        _randomize(alone, slot)
        (expected,) = alone.backward([Part(slot, parts[number].rows, 0, 4)], [counts[number]])
        assert sums[number].item() == pytest.approx(expected.item(), rel=1e-6)  # norms are float32 inside transformers
        for name, parameter in alone.weights(slot).flat().items():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
            found = gradients[f"{number}/{name}"]
            assert (found - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()
        alone.free(slot)


def _randomize(pack: Pack, slot: int) -> None:
    pack.weights(slot).flat()["b"].data.normal_(std=0.1, generator=torch.Generator().manual_seed(10))


def _flat(pack: Pack, count: int) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"{slot}/{name}", value) for slot in range(count) for name, value in pack.weights(slot).flat().items()]
