import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from qlora_core.errors import ModelError
from qlora_core.model.adapter import attach_adapter
from qlora_core.model.adapter_set import AdapterSet, NamedAdapter, attached_adapters
from qlora_core.model.base import load_plain, load_quantized
from qlora_core.model.generate import generate_answers

PROMPTS = ["<s>Hi", "<s>A much longer prompt than that", "<s>x", "<s>Tell me", "<s>0123456789", "<s>zzzz"]
NEVER = 2  # </s>
OTHER_KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "sliding-window": lambda: MistralForCausalLM(
        MistralConfig(
            vocab_size=98, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=6, initializer_range=0.4,
        )
    ),
    "learned-positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=98, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4)
    ),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=98, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, initializer_factor=8.0,
            **{"tie_word_embeddings": False, "decoder_start_token_id": 0},
        )
    ),
}  # fmt: skip


def by_hand(model: PreTrainedModel, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy continuation without cache, padding or generate()."""
    continuation: list[int] = []
    with torch.inference_mode():
        for _ in range(new_tokens):
            if model.config.is_encoder_decoder:
                begun = torch.tensor([[0, *continuation]])
                logits = model(torch.tensor([ids]), decoder_input_ids=begun, use_cache=False).logits
            else:
                logits = model(torch.tensor([ids + continuation]), use_cache=False).logits
            continuation.append(int(logits[0, -1].argmax()))
    return continuation


def continuations_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Twelve tokens by hand after each of PROMPTS."""
    return [by_hand(model, tokenizer(prompt, add_special_tokens=False)["input_ids"], 12) for prompt in PROMPTS]


def often_met(continuations: list[list[int]]) -> int:
    """The token that stops these at the most different places."""
    return max(range(3, 98), key=lambda token: len({ids.index(token) for ids in continuations if token in ids}))


def answers(
    model: PreTrainedModel | PeftModel | AdapterSet,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    **changes: Any,
) -> list[str]:
    settings: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 3, "stop_token_id": NEVER, **changes}
    return generate_answers(model, tokenizer, prompts, **settings)


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_answers_are_the_most_probable_tokens_whatever_the_batch(
    shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    found = answers(shared_model, tokenizer, PROMPTS, batch_size=batch_size)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = by_hand(shared_model, tokenizer(prompt, add_special_tokens=False)["input_ids"], 12)
        ids = ids[: ids.index(NEVER)] if NEVER in ids else ids
        assert answer == tokenizer.decode(ids, skip_special_tokens=True)


def test_answer_ends_before_the_stop_token(shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = by_hand(shared_model, tokenizer("<s>Hi", add_special_tokens=False)["input_ids"], 12)
    stop = next(token for place, token in enumerate(whole) if place >= 3 and token not in whole[:place] and token > 2)
    found = answers(shared_model, tokenizer, ["<s>Hi"], stop_token_id=stop)
    assert found == [tokenizer.decode(whole[: whole.index(stop)], skip_special_tokens=True)]


def test_stop_token_of_id_zero_is_no_trap(shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Id 0 pads the prompts; as the stop token it must still only stop."""
    assert answers(shared_model, tokenizer, PROMPTS, stop_token_id=0) == [
        answers(shared_model, tokenizer, [prompt], stop_token_id=0)[0] for prompt in PROMPTS
    ]


def test_no_special_tokens_are_added_to_the_prompt(
    shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with_bos, without = answers(shared_model, tokenizer, ["<s>Hi", "Hi"])
    assert with_bos != without


def test_the_bases_own_generation_settings_are_not_used(
    nf4_folder: Path, tmp_path: Path, shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for path in nf4_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "max_new_tokens": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model = load_quantized(tmp_path, device="cpu")
    assert answers(model, tokenizer, PROMPTS) == answers(shared_model, tokenizer, PROMPTS)
    assert model.generation_config.repetition_penalty == 5.0  # given back afterwards
    assert model.config.use_cache is False


def test_answers_stop_where_the_models_positions_end(
    shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    long, short = "<s>" + "q" * 58, "<s>q"
    found = answers(shared_model, tokenizer, [long, short], max_new_tokens=20)
    ids = by_hand(shared_model, tokenizer(long, add_special_tokens=False)["input_ids"], 5)
    assert found[0] == tokenizer.decode(ids[: ids.index(NEVER)] if NEVER in ids else ids, skip_special_tokens=True)
    assert found[1] == answers(shared_model, tokenizer, [short], max_new_tokens=20)[0]


def test_prompt_that_leaves_no_room_is_named(shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="prompt 1 has 64 tokens and the model takes 64"):
        answers(shared_model, tokenizer, ["<s>ok", "<s>" + "q" * 63])
    with pytest.raises(ModelError, match="prompt 0 is empty"):
        answers(shared_model, tokenizer, [""])


def test_no_prompts_give_no_answers(shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert answers(shared_model, tokenizer, []) == []


@pytest.mark.parametrize("stop", [NEVER, 40])
def test_each_prompt_is_answered_as_by_its_adapter_alone(
    model: PreTrainedModel,
    nf4_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    unlike_adapters: dict[str, Path],
    stop: int,
) -> None:
    systems = [None, *unlike_adapters]
    prompts = PROMPTS[:4]
    asked = [(prompt, system) for prompt in prompts for system in systems]
    with attached_adapters(model, [NamedAdapter(*item) for item in unlike_adapters.items()]) as adapters:
        mixed = {
            batch_size: answers(
                adapters,
                tokenizer,
                [prompt for prompt, _ in asked],
                adapters=[system for _, system in asked],
                batch_size=batch_size,
                stop_token_id=stop,
            )
            for batch_size in (5, 24)
        }
    assert mixed[5] == mixed[24]
    seen = set()
    for system in systems:
        alone = load_quantized(nf4_folder, device="cpu")
        stock = alone if system is None else attach_adapter(alone, unlike_adapters[system])
        expected = answers(stock, tokenizer, prompts, batch_size=1, stop_token_id=stop)
        assert [answer for answer, (_, by) in zip(mixed[5], asked, strict=True) if by == system] == expected
        seen.add(tuple(expected))
    assert len(seen) == len(systems)  # no two systems answer alike, so none stands in for another


def test_stopped_rows_cost_no_more_steps(shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A row is in a step for each of its tokens and for the stop token that ends it, and in no other."""
    continuations = continuations_of(shared_model, tokenizer)
    for stop in (often_met(continuations), -1):
        given: list[int] = []
        embedding = shared_model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _, args, y, given=given: given.append(len(args[0])))
        answers(shared_model, tokenizer, PROMPTS, batch_size=len(PROMPTS), stop_token_id=stop)
        hook.remove()
        needed = [ids.index(stop) + 1 if stop in ids else 12 for ids in continuations]
        assert sum(given) == sum(needed)
        assert (stop == -1) == (sum(needed) == 12 * len(PROMPTS))


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_rows_that_go_on_are_not_disturbed_by_those_that_leave(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """Other caches and positions than Llama's: each answer is as by hand, while rows leave at different steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OTHER_KINDS[kind]().eval()
    continuations = continuations_of(model, tokenizer)
    stop = often_met(continuations)
    whole = [ids[: ids.index(stop)] if stop in ids else ids for ids in continuations]
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]
    assert len({len(ids) for ids in whole}) > 2
    assert answers(model, tokenizer, PROMPTS, batch_size=6, stop_token_id=stop) == expected


def test_adapters_that_cannot_be_given_are_refused(
    shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, unlike_adapters: dict[str, Path]
) -> None:
    with pytest.raises(ModelError, match="only for an AdapterSet"):
        answers(shared_model, tokenizer, PROMPTS, adapters=[None] * len(PROMPTS))
    with attached_adapters(shared_model, [NamedAdapter("rs", unlike_adapters["rs"])]) as adapters:
        with pytest.raises(ModelError, match="1 adapters are named for 6 rows"):
            answers(adapters, tokenizer, PROMPTS, adapters=["rs"])
        with pytest.raises(ModelError, match="no adapter is named 'champion' here; there are rs"):
            answers(adapters, tokenizer, ["<s>Hi"], adapters=["champion"])
        assert answers(adapters, tokenizer, PROMPTS) == answers(shared_model, tokenizer, PROMPTS)


@pytest.mark.integration
def test_pretrained_model_tells_its_known_story(shared_data: Path) -> None:
    """The text that llama2.c's own test pins for this model's greedy decoding (test_all.py)."""
    folder = shared_data / "models" / "stories260K-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    story = generate_answers(
        load_plain(folder, device="cpu"), tokenizer, ["<s>"], max_new_tokens=60, batch_size=1, stop_token_id=2
    )
    assert story[0].startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it"
    )
