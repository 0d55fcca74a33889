import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.errors import ModelError
from qlora_core.model.base import load_plain, load_quantized
from qlora_core.model.generate import generate_answers

PROMPTS = ["<s>Hi", "<s>A much longer prompt than that", "<s>x", "<s>Tell me", "<s>0123456789", "<s>zzzz"]
NEVER = 2  # </s>


def by_hand(model: PreTrainedModel, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy continuation without cache, padding or generate()."""
    continuation: list[int] = []
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits = model(torch.tensor([ids + continuation]), use_cache=False).logits
            continuation.append(int(logits[0, -1].argmax()))
    return continuation


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], **changes: int
) -> list[str]:
    settings = {"max_new_tokens": 12, "batch_size": 3, "stop_token_id": NEVER, **changes}
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
