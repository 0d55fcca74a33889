"""Perplexity and difficulty equal a reference that scores one row at a time, unpadded, in float64."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.loss_mask import MaskedRow, mask_rows
from qlora_core.data.row import Row
from qlora_core.data.tags.model_scores import ModelScoresTagger

POSITIONS = 160


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).double().eval()


def mean_nats(model: LlamaForCausalLM, context: list[int], answer: list[int]) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([context + answer]), use_cache=False).logits[0]
    places = range(len(context), len(context) + len(answer))
    return -math.fsum(torch.log_softmax(logits[at - 1], -1)[(context + answer)[at]].item() for at in places) / len(
        answer
    )


def reference(model: LlamaForCausalLM, chat: ChatTokenizer, row: Row) -> tuple[float, float]:
    (masked,) = mask_rows(chat, [row])
    assert isinstance(masked, MaskedRow)
    turn = masked.turns[-1]
    ids = list(masked.input_ids)
    before, answer = ids[: turn.start], ids[turn.start : turn.stop]
    if chat.bos_token_id is None:
        # The first token is predicted from nothing when it stands alone.
        context, alone = [*before, answer[0]], [answer[0]]
        answer = answer[1:]
    else:
        context, alone = before, [chat.bos_token_id]
    conditioned = mean_nats(model, context, answer)
    return math.exp(conditioned), math.exp(conditioned - mean_nats(model, alone, answer))


@pytest.mark.parametrize("kind", ["plain_tokenizer", "chatml_tokenizer"])
def test_scores_equal_the_reference_whatever_the_batch(
    kind: str, request: pytest.FixtureRequest, model: LlamaForCausalLM, row: Callable[..., Row]
) -> None:
    chat = load_chat_tokenizer(request.getfixturevalue(kind))
    rows = [
        row("What comes first?", "Alpha comes first, then Beta."),
        row("Hi", "No answer."),
        row("What is Alpha?", "The answer is what comes first.", "And Beta?", "Beta comes then."),
    ]
    expected = [reference(model, chat, one) for one in rows]
    for batch_size in (1, 4):
        made = ModelScoresTagger(model, chat, base_digest="b", max_positions=POSITIONS, batch_size=batch_size).tag(rows)
        assert made.table.column("perplexity").to_pylist() == [float(f"{one:.5g}") for one, _ in expected]
        assert made.table.column("ifd").to_pylist() == [float(f"{two:.5g}") for _, two in expected]
        assert not made.failed.any()


def test_single_precision_scores_do_not_depend_on_the_rows_scored_with_them(
    plain_tokenizer: Path, model: LlamaForCausalLM, row: Callable[..., Row]
) -> None:
    chat = load_chat_tokenizer(plain_tokenizer)
    single = copy.deepcopy(model).float()
    rows = [row("What is Alpha?", f"Alpha comes first{', then Beta' * n}.") for n in range(4)]
    tagger = ModelScoresTagger(single, chat, base_digest="b", max_positions=POSITIONS)

    together = tagger.tag(rows).table
    by_itself = pa.concat_tables([tagger.tag([one]).table for one in rows])

    assert together.column("ifd").null_count == 0
    assert together.to_pydict() == by_itself.to_pydict()


def test_rows_that_cannot_be_scored_whole_are_null_and_failed(
    plain_tokenizer: Path, model: LlamaForCausalLM, row: Callable[..., Row]
) -> None:
    chat = load_chat_tokenizer(plain_tokenizer)
    tagger = ModelScoresTagger(model, chat, base_digest="b", max_positions=POSITIONS)
    made = tagger.tag([row("Hi", "x" * 400), row("Hi", "Alpha comes first."), row("Hi", "A <|end|> within")])
    assert made.failed.tolist() == [True, False, True]
    assert [score is None for score in made.table.column("ifd").to_pylist()] == [True, False, True]
    assert made.table.column("perplexity").null_count == 2


def test_another_base_has_another_fingerprint(plain_tokenizer: Path, model: LlamaForCausalLM) -> None:
    chat = load_chat_tokenizer(plain_tokenizer)
    made = [ModelScoresTagger(model, chat, base_digest=base, max_positions=POSITIONS) for base in "ab"]
    assert made[0].fingerprint != made[1].fingerprint
    assert made[0].tag([]).table.num_rows == 0
