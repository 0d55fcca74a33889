"""Cross-entropy of token rows under a model, summed per row. Knows nothing of texts, windows or averages.

Shapes, as suffixes of names: b rows of a batch, t tokens, v vocabulary, n counted tokens of one row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from qlora_core.errors import ModelError
from qlora_core.model.adapter_set import AdapterSet, adapters_of_rows, rows_of
from qlora_core.model.encoder_decoder import answer_start, encoder_decoder_inputs, is_encoder_decoder
from qlora_core.model.padding import right_padded


class ScoredRow(Protocol):
    """A tokenized row: `loss_mask[i]` says whether `input_ids[i]` counts when it is predicted from those before it."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids."""
        ...

    @property
    def loss_mask(self) -> Sequence[bool]:
        """One per token: whether it counts."""
        ...


def sequence_losses(
    model: PreTrainedModel | PeftModel | AdapterSet,
    rows: Sequence[ScoredRow],
    *,
    batch_size: int,
    adapters: Sequence[str | None] | None = None,
) -> list[tuple[float, int]]:
    """For each row, in the given order: the sum of -ln p over its counted tokens (nats), and how many those are.

    A row gives the sum over t >= 1 with loss_mask[t] of -ln p(input_ids[t] | input_ids[:t]). The first token is
    predicted from nothing and never counts; a row without counted tokens gives (0.0, 0). Softmax is taken in float32
    (or the logits' own dtype if wider), sums in float64. Rows are batched by length, padded on the right and masked, so
    that the batch size changes a result by rounding only. An encoder reads the prompt alone, see
    `encoder_decoder`. The model is used as it is; put it into eval mode first.
    `adapters`, with an `AdapterSet` as the model: the name of each row's adapter, None for the base.

    Raises:
        ModelError: a mask and its ids differ in length, or a row is longer than the model's positions; `adapters` are
            not one per row, not in the set, or given without one.
    """
    adapters = adapters_of_rows(model, adapters, len(rows))
    inner = model.base if isinstance(model, AdapterSet) else model
    _check_rows(rows, max_positions_of(inner))
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    counted = [index for index, row in enumerate(rows) if any(row.loss_mask[1:])]
    for batch in batches_by_length([len(rows[index].input_ids) for index in counted], batch_size):
        indices = [counted[place] for place in batch]
        with rows_of(model, [adapters[index] for index in indices]):
            found = _batch_losses(inner, [rows[index] for index in indices])
        for index, result in zip(indices, found, strict=True):
            results[index] = result
    return results


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Positions in `lengths`, longest first (memory runs out at once or never), `batch_size` at a time.

    Raises:
        ValueError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def max_positions_of(model: PreTrainedModel | PeftModel) -> int | None:
    """The longest sequence of a loaded model in tokens, or None where its config sets no limit."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def _check_rows(rows: Sequence[ScoredRow], limit: int | None) -> None:
    for index, row in enumerate(rows):
        if len(row.input_ids) != len(row.loss_mask):
            raise ModelError(
                f"row {index} has {len(row.input_ids)} tokens but a loss mask of {len(row.loss_mask)}; curate again"
            )
        if limit is not None and len(row.input_ids) > limit:
            raise ModelError(
                f"row {index} has {len(row.input_ids)} tokens, the model takes {limit}; lower data.max_tokens"
            )


def _batch_losses(model: PreTrainedModel | PeftModel, rows: Sequence[ScoredRow]) -> list[tuple[float, int]]:
    if is_encoder_decoder(model):
        with torch.inference_mode():
            logits_btv = model(**encoder_decoder_inputs(model, rows)).logits
            return [
                _row_loss(logits_tv, row, answer_start(row)) for logits_tv, row in zip(logits_btv, rows, strict=True)
            ]
    ids_bt, attention_bt = right_padded([row.input_ids for row in rows], model.device)
    with torch.inference_mode():
        logits_btv = model(input_ids=ids_bt, attention_mask=attention_bt, use_cache=False).logits
        return [_row_loss(logits_btv[place], row, 1) for place, row in enumerate(rows)]


def _row_loss(logits_tv: torch.Tensor, row: ScoredRow, first: int) -> tuple[float, int]:
    """`first`: the place in the row of the token that the first logits predict."""
    places = [place for place, counts in enumerate(row.loss_mask) if counts and place > 0]
    targets_n = torch.tensor(places, device=logits_tv.device)
    logits_nv = logits_tv[targets_n - first]
    ids_n = torch.tensor([row.input_ids[place] for place in places], device=logits_tv.device)
    wide = torch.promote_types(logits_nv.dtype, torch.float32)
    nats_n = cross_entropy(logits_nv.to(wide), ids_n, reduction="none")
    return nats_n.double().sum().item(), len(places)
