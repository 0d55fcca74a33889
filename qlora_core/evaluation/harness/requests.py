"""Log-probabilities of continuations under one system of a model. Knows tokens and batches, nothing of the harness.

Shapes, as suffixes of names: b rows of a batch, t tokens, v vocabulary, n tokens of one continuation.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from qlora_core.errors import EvaluationError
from qlora_core.model.adapter_set import AdapterSet, rows_of
from qlora_core.model.loss import batches_by_length, max_positions_of
from qlora_core.model.padding import right_padded


class Continuation(NamedTuple):
    """`ids` to be predicted after `context`; a context must hold at least one token."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


class Scored(NamedTuple):
    """ln p of a continuation in nats, and whether each of its tokens was the likeliest one."""

    log_probability: float
    greedy: bool


def score_continuations(
    model: PreTrainedModel | AdapterSet,
    continuations: Sequence[Continuation],
    *,
    batch_size: int,
    system: str | None,
    advance: Callable[[float], None],
) -> list[Scored]:
    """The score of each continuation, in order; an empty one is certain (0.0, True).

    A context too long for the model's positions loses its oldest tokens. Continuations that share all tokens but their
    last (the options of a multiple choice) are read once. Softmax in float32 or wider, sums in float64.

    Raises EvaluationError where a context is empty or a continuation alone exceeds the positions.
    """
    inner = model.base if isinstance(model, AdapterSet) else model
    limit = max_positions_of(inner)
    by_input: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, each in enumerate(continuations):
        by_input[_input_of(each, limit)].append(index)
    scored = [Scored(0.0, True)] * len(continuations)
    inputs = list(by_input)
    for batch in batches_by_length([len(ids) for ids in inputs], batch_size):
        rows = [inputs[place] for place in batch]
        with rows_of(model, [system] * len(rows)):
            logits_btv = _logits(inner, rows)
        for row, ids in enumerate(rows):
            for index in by_input[ids]:
                scored[index] = _score(logits_btv[row, : len(ids)], continuations[index].ids)
        advance(sum(len(by_input[ids]) for ids in rows))
    return scored


def _input_of(each: Continuation, limit: int | None) -> tuple[int, ...]:
    """What the model reads: all but the last token, at most as much as it has positions for."""
    if not each.context:
        raise EvaluationError("a request has no context; give it at least the tokenizer's BOS or EOS")
    if limit is not None and len(each.ids) > limit:
        raise EvaluationError(f"a continuation has {len(each.ids)} tokens, the model takes {limit}; shorten the task's")
    ids = (*each.context, *each.ids)[:-1]
    return ids if limit is None else ids[-limit:]


@torch.inference_mode()
def _logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    ids_bt, attention_bt = right_padded(rows, model.device)
    return model(input_ids=ids_bt, attention_mask=attention_bt, use_cache=False).logits


def _score(logits_tv: torch.Tensor, ids: Sequence[int]) -> Scored:
    if not ids:
        return Scored(0.0, True)
    logits_nv = logits_tv[-len(ids) :]
    wide = torch.promote_types(logits_nv.dtype, torch.float32)
    log_probabilities_nv = torch.log_softmax(logits_nv.to(wide), dim=-1)
    ids_n = torch.tensor(list(ids), device=logits_tv.device)
    total = log_probabilities_nv.gather(1, ids_n[:, None]).double().sum().item()
    if total != total:
        raise EvaluationError("the model's log-probabilities are not finite; check the base and the adapter")
    return Scored(total, bool((log_probabilities_nv.argmax(dim=-1) == ids_n).all()))
