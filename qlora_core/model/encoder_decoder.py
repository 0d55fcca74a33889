"""Rows for models of an encoder and a decoder (T5): the prompt goes to the one, the answer is the other's.

A row is cut before its first counted token. What follows is what the decoder says, later turns included; its mask
still says which of these tokens count. Knows nothing of losses or adapters. Shapes: B rows, S source tokens of the
longest, T target tokens of the longest.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from qlora_core.errors import ModelError
from qlora_core.model.padding import right_padded


class MaskedTokens(Protocol):
    """A tokenized row: `loss_mask[i]` says whether `input_ids[i]` counts when it is predicted from those before it."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids."""
        ...

    @property
    def loss_mask(self) -> Sequence[bool]:
        """One per token: whether it counts."""
        ...


def is_encoder_decoder(model: Any) -> bool:
    """Whether the model reads a prompt with an encoder and answers with a decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def answer_start(row: MaskedTokens) -> int:
    """Where a row is cut: tokens before this place are the encoder's.

    Raises:
        ModelError: no token counts, or the first one does, so that there is no prompt.
    """
    start = next((place for place, counts in enumerate(row.loss_mask) if counts), 0)
    if start == 0:
        raise ModelError("a row for an encoder and a decoder needs a prompt and, after it, a token that counts")
    return start


def answer_start_id(model: Any) -> int | None:
    """The token that a decoder is begun with; None for models without an encoder, which go on with the prompt.

    Raises:
        ModelError: the config of an encoder-decoder model does not say how an answer begins.
    """
    return _start_id(model) if is_encoder_decoder(model) else None


def start_of_answer(model: Any) -> dict[str, Any]:
    """What a forward pass of one prompt needs beside it to give the logits of the answer's first token; often nothing.

    Raises:
        ModelError: the config of an encoder-decoder model does not say how an answer begins.
    """
    if not is_encoder_decoder(model):
        return {}
    return {"decoder_input_ids": torch.tensor([[_start_id(model)]], device=model.device)}


def encoder_decoder_inputs(model: Any, rows: Sequence[MaskedTokens]) -> dict[str, Any]:
    """Arguments of a forward pass over the rows, padded on the right: logits [B, T, vocabulary].

    The logits at t of a row predict its token `answer_start(row) + t`.
    """
    starts = [answer_start(row) for row in rows]
    sources = [list(row.input_ids[:start]) for row, start in zip(rows, starts, strict=True)]
    targets = [[_start_id(model), *row.input_ids[start:-1]] for row, start in zip(rows, starts, strict=True)]
    source_BS, source_mask_BS = right_padded(sources, model.device)
    target_BT, target_mask_BT = right_padded(targets, model.device)
    return {
        "input_ids": source_BS,
        "attention_mask": source_mask_BS,
        "decoder_input_ids": target_BT,
        "decoder_attention_mask": target_mask_BT,
        "use_cache": False,
    }


def _start_id(model: Any) -> int:
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise ModelError(
            f"the config of {type(model).__name__} names no decoder_start_token_id, so no answer can begin; add it to "
            "config.json (T5 takes its pad_token_id)"
        )
    return int(start)
