"""Greedy answers to prompts that are already rendered, many at a time, each by the adapter it names.

Knows nothing of chat templates or metrics.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_core.errors import ModelError
from qlora_core.model.adapter_set import AdapterSet, adapters_of_rows, rows_of
from qlora_core.model.encoder_decoder import answer_start_id
from qlora_core.model.greedy import continue_greedily
from qlora_core.model.loss import batches_by_length, max_positions_of
from qlora_core.model.padding import PADDING_ID
from qlora_core.progress import progress_bar


def generate_answers(
    model: PreTrainedModel | PeftModel | AdapterSet,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_token_id: int,
    adapters: Sequence[str | None] | None = None,
) -> list[str]:
    """The most probable continuation of each prompt, token by token, in the order of the prompts.

    Prompts hold their special tokens as text already; none is added. An answer ends before the stop token, after
    `max_new_tokens`, or where the model's positions end; special tokens are left out of its text. Prompts are batched
    by length and padded on the left, so that the batch size changes an answer only where two tokens tie to rounding.
    An answer that has ended leaves its batch. Sampling and other settings of the base's generation_config.json are not
    used.

    `adapters`, with an `AdapterSet` as the model: the name of each prompt's adapter, None for the base. A batch mixes
    them; an answer depends on its own alone, up to the same ties.

    Raises:
        ModelError: a prompt is empty, or fills the model's positions and leaves no room to answer; `adapters` are not
            one per prompt, not in the set, or given without one.
    """
    adapters = adapters_of_rows(model, adapters, len(prompts))
    prompt_ids = [tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] for prompt in prompts]
    inner = _inner(model)
    limit = max_positions_of(inner)
    budgets = [_budget(index, ids, max_new_tokens, limit) for index, ids in enumerate(prompt_ids)]
    answers = [""] * len(prompts)
    with progress_bar("Answering", len(prompts)) as advance, _greedy(inner, stop_token_id):
        for batch in _batches(prompt_ids, budgets, batch_size):
            rows = [prompt_ids[index] for index in batch]
            with rows_of(model, [adapters[index] for index in batch]) as keep:
                found = _continue(inner, rows, budgets[batch[0]], stop_token_id, keep)
            for index, ids in zip(batch, found, strict=True):
                answers[index] = cast(str, tokenizer.decode(ids, skip_special_tokens=True))
            advance(len(batch))
    return answers


def _inner(model: PreTrainedModel | PeftModel | AdapterSet) -> PreTrainedModel:
    """The model that generates, with whatever layers PEFT has put into it."""
    if isinstance(model, AdapterSet):
        return model.base
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def _budget(index: int, ids: Sequence[int], max_new_tokens: int, limit: int | None) -> int:
    """How many tokens may follow this prompt."""
    if not ids:
        raise ModelError(f"prompt {index} is empty; a prompt needs at least one token")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids))
    if room < 1:
        raise ModelError(
            f"prompt {index} has {len(ids)} tokens and the model takes {limit}, which leaves no room for an answer; "
            "shorten it or leave it out"
        )
    return room


def _batches(prompt_ids: Sequence[Sequence[int]], budgets: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches by length; rows of one batch share a budget, so that none runs past the model's positions for another."""
    for budget in sorted(set(budgets)):
        group = [index for index, own in enumerate(budgets) if own == budget]
        for batch in batches_by_length([len(prompt_ids[index]) for index in group], batch_size):
            yield [group[place] for place in batch]


def _continue(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_token_id: int,
    keep: Callable[[Sequence[int]], object],
) -> list[list[int]]:
    longest = max(len(ids) for ids in prompt_ids)
    ids_bt = torch.full((len(prompt_ids), longest), PADDING_ID, dtype=torch.long)
    attention_bt = torch.zeros((len(prompt_ids), longest), dtype=torch.long)
    for place, ids in enumerate(prompt_ids):
        ids_bt[place, longest - len(ids) :] = torch.tensor(list(ids), dtype=torch.long)
        attention_bt[place, longest - len(ids) :] = 1
    return continue_greedily(
        model,
        ids_bt.to(model.device),
        attention_bt.to(model.device),
        max_new_tokens=max_new_tokens,
        stop_token_id=stop_token_id,
        on_keep=keep,
    )


@contextmanager
def _greedy(model: PreTrainedModel, stop_token_id: int) -> Iterator[None]:
    """The model with plain greedy settings: what a call leaves open, `generate` would take from the base's own file."""
    own = model.generation_config
    was_training = model.training
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        eos_token_id=stop_token_id,
        pad_token_id=PADDING_ID,
        decoder_start_token_id=answer_start_id(model),
    )
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)
