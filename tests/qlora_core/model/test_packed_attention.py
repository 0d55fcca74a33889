"""Documents that share a sequence give the logits they give alone, in every family, and do not feel each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core.errors import ModelError
from qlora_core.model.packed_attention import check_isolation, document_positions, isolating_inputs

WINDOW = 4
LENGTHS = [[9, 1, 6], [7, 5]]
WIDTH = 16
SIZES: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
MIXED_LAYERS = ["sliding_attention", "full_attention"]
# Windows shorter than the documents: a mask that forgets them is caught as well
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": WINDOW}),
    "mistral, no window": ("MistralConfig", GROUPED | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2, mixed": (
        "Qwen2Config",
        GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "phi3": ("Phi3Config", GROUPED | {"sliding_window": WINDOW}),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED_LAYERS},
    ),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "opt": (
        "OPTConfig",
        {name: value for name, value in SIZES.items() if name not in ("intermediate_size", "initializer_range")}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
}
EAGER_ONLY = {"gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8, "sliding_window": WINDOW})}
CASES = [(name, code) for name in FAMILIES for code in ("sdpa", "eager")] + [(name, "eager") for name in EAGER_ONLY]

Build = Callable[[str, str], PreTrainedModel]


@pytest.fixture(scope="module")
def build() -> Build:
    """Models by family and attention code; random weights, wide enough to make logits of several units."""
    made: dict[tuple[str, str], PreTrainedModel] = {}

    def model(family: str, code: str) -> PreTrainedModel:
        if (family, code) not in made:
            made[family, code] = _random_model(*(FAMILIES | EAGER_ONLY)[family], code)
        return made[family, code]

    return model


def _random_model(config_class: str, settings: dict[str, Any], code: str = "sdpa") -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(_config(config_class, settings), attn_implementation=code).eval()


def _config(config_class: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, config_class)(**settings)


def _documents(seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, 98, (length,), generator=generator) for length in lengths] for lengths in LENGTHS]


def _packed(documents: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions [B, T] of the documents, padded to WIDTH."""
    ids = [torch.cat(row) for row in documents]
    ids_BT = torch.stack([torch.nn.functional.pad(row, (0, WIDTH - len(row))) for row in ids])
    positions = [document_positions([len(document) for document in row], WIDTH) for row in documents]
    return ids_BT, torch.tensor(positions)


def _apart(logits_BTV: torch.Tensor) -> list[torch.Tensor]:
    """The logits of each document."""
    parts = []
    for row_TV, lengths in zip(logits_BTV, LENGTHS, strict=True):
        parts += row_TV[: sum(lengths)].split(lengths)
    return parts


@torch.no_grad()
def _alone(model: PreTrainedModel, documents: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [model(input_ids=ids[None], use_cache=False).logits[0] for row in documents for ids in row]


def _worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("family", "code"), CASES)
def test_packed_logits_equal_unpacked_logits(build: Build, family: str, code: str) -> None:
    model, documents = build(family, code), _documents()
    ids_BT, positions_BT = _packed(documents)
    with torch.no_grad():
        found = _apart(model(input_ids=ids_BT, **isolating_inputs(model, positions_BT)).logits)
    assert _worst(found, _alone(model, documents)) < 1e-5
    check_isolation(model)


@pytest.mark.parametrize(("family", "code"), CASES)
@pytest.mark.parametrize("restart_positions", [False, True])
def test_control_a_mask_of_ones_is_far_off(build: Build, family: str, code: str, restart_positions: bool) -> None:
    model, documents = build(family, code), _documents()
    ids_BT, positions_BT = _packed(documents)
    positions = {"position_ids": positions_BT} if restart_positions else {}
    with torch.no_grad():
        naive = _apart(
            model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False, **positions).logits
        )
    assert _worst(naive, _alone(model, documents)) > 1


def test_control_positions_without_a_mask_do_not_isolate_with_the_default_cache(build: Build) -> None:
    model, documents = build("llama", "sdpa"), _documents()
    ids_BT, positions_BT = _packed(documents)
    with torch.no_grad():
        cached = _apart(model(input_ids=ids_BT, position_ids=positions_BT).logits)
    assert _worst(cached, _alone(model, documents)) > 1


@pytest.mark.parametrize("use_cache", [False, True])
def test_the_mask_isolates_whatever_the_cache(build: Build, use_cache: bool) -> None:
    model, documents = build("llama", "eager"), _documents()
    ids_BT, positions_BT = _packed(documents)
    inputs = isolating_inputs(model, positions_BT) | {"use_cache": use_cache}
    with torch.no_grad():
        found = _apart(model(input_ids=ids_BT, **inputs).logits)
    assert _worst(found, _alone(model, documents)) < 1e-5


@pytest.mark.parametrize(("family", "code"), CASES)
def test_one_document_does_not_move_another_by_a_single_bit(build: Build, family: str, code: str) -> None:
    model, documents = build(family, code), _documents()
    changed = [[_documents(seed=1)[0][0], *documents[0][1:]], documents[1]]
    logits = []
    for version in (documents, changed):
        ids_BT, positions_BT = _packed(version)
        with torch.no_grad():
            logits.append(_apart(model(input_ids=ids_BT, **isolating_inputs(model, positions_BT)).logits))
    before, after = logits
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_the_gradient_of_one_documents_loss_does_not_reach_another(build: Build, family: str) -> None:
    model = build(family, "sdpa")
    ids_BT, positions_BT = _packed(_documents())
    embedded = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    # Gemma scales embeddings inside its layer, so what goes in here is what the first block sees
    logits_BTV = model(inputs_embeds=embedded, **isolating_inputs(model, positions_BT)).logits
    start, end = LENGTHS[0][0], LENGTHS[0][0] + LENGTHS[0][1] + LENGTHS[0][2]
    logits_BTV[0, start + 1 : end].logsumexp(-1).sum().backward()
    assert embedded.grad is not None
    reached_T = embedded.grad[0].abs().amax(-1) > 0
    assert reached_T[start + 1 : end].all()
    assert not reached_T[: start + 1].any() and not reached_T[end:].any()
    assert not embedded.grad[1].any()


def test_single_documents_without_padding_need_no_special_mask(build: Build) -> None:
    model = build("qwen2, mixed", "sdpa")
    ids_BT = torch.stack([_documents()[0][0], _documents(seed=1)[0][0]])
    positions_BT = torch.tensor([document_positions([9], 9)] * 2)
    with torch.no_grad():
        found = model(input_ids=ids_BT, **isolating_inputs(model, positions_BT)).logits
        expected = model(input_ids=ids_BT, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_padding_is_a_document_of_its_own() -> None:
    assert document_positions([3, 1, 2], 8) == [0, 1, 2, 0, 0, 1, 0, 1]
    assert document_positions([2], 2) == [0, 1]


def test_the_check_passes_a_quantized_base(shared_model: PreTrainedModel) -> None:
    check_isolation(shared_model)


def test_the_check_refuses_convolutions_across_documents() -> None:
    settings = GROUPED | {"layer_types": ["conv", "full_attention"]}
    with pytest.raises(ModelError, match=r"Lfm2ForCausalLM lets rows .* see each other: .* data\.packing\.enabled to"):
        check_isolation(_random_model("Lfm2Config", settings))


def test_the_check_refuses_a_model_that_ignores_the_mask() -> None:
    class Deaf(transformers.LlamaForCausalLM):
        def forward(self, *inputs: Any, position_ids: Any = None, **options: Any) -> Any:
            ids = options["input_ids"]
            return super().forward(ids, attention_mask=torch.ones_like(ids), position_ids=position_ids)

    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Deaf(_config("LlamaConfig", GROUPED)).eval()
    with pytest.raises(ModelError, match="Deaf lets rows that share a sequence see each other"):
        check_isolation(model)


def test_the_check_refuses_models_without_positions_or_masks() -> None:
    bloom = {"vocab_size": 98, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    with pytest.raises(ModelError, match="BloomForCausalLM takes no position_ids"):
        check_isolation(_random_model("BloomConfig", bloom, "eager"))
    falcon = {"vocab_size": 98, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}
    with pytest.raises(ModelError, match="FalconForCausalLM cannot take a mask"):
        check_isolation(_random_model("FalconConfig", falcon))
