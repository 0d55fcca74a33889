"""Attention within documents that lie end to end in one sequence, without padding and without a mask of T x T.

Registered with transformers under a name of its own. A forward pass that uses it is told where documents end by
`document_lengths`, which transformers hands through to every attention layer; each document is one call of torch's
scaled dot product attention. Knows nothing of rows, losses or adapters. Shapes: H heads, T tokens of all documents, D
features of a head.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from qlora_core.errors import ModelError
from qlora_core.model.encoder_decoder import is_encoder_decoder

_LOGGER = logging.getLogger(__name__)

NAME = "qlora_documents"
_UNKNOWN_EXTRAS = ("s_aux", "position_bias", "cache")
_PROBE_LENGTHS = (6, 5)
# Rounding of a deep model, as a share of its logits' spread; documents that see each other differ by far more.
_TOLERANCE_32_BIT = 1e-3
_TOLERANCE_16_BIT = 0.05


def attend_within_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_lengths: Sequence[int] | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each document to itself: query [1, H, T, D], key and value [1, H', T, D] with H' dividing H.

    Returns [1, T, H, D]. `scaling` None is 1 / sqrt(D). A document longer than `sliding_window` sees that many tokens
    back. Dropout of attention weights is a base's own and stays off, for the base is not what is trained.

    Raises:
        ModelError: no `document_lengths`, or an extra of this architecture that is not known here.
    """
    unknown = [name for name in _UNKNOWN_EXTRAS if extras.get(name) is not None]
    if document_lengths is None or unknown:
        reason = f"uses {', '.join(unknown)}" if unknown else "was given no document lengths"
        raise ModelError(f"{type(module).__name__} {reason}; rows cannot lie end to end for this base")
    attended = [
        _attend(own_query, own_key, own_value, scaling, sliding_window, softcap)
        for own_query, own_key, own_value in zip(
            *(part.split(list(document_lengths), dim=2) for part in (query, key, value)), strict=True
        )
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    seen_TT = _window_mask(length, window, query.device) if window is not None and window < length else None
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=seen_TT, is_causal=seen_TT is None, scale=scaling, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scale
    scores = torch.tanh(scores / softcap) * softcap
    seen_TT = _window_mask(length, length, query.device) if seen_TT is None else seen_TT
    weights = scores.masked_fill(~seen_TT, torch.finfo(scores.dtype).min).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value.repeat_interleave(groups, dim=1)


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[T, T]: which tokens each token sees, itself and `window` - 1 before it."""
    places = torch.arange(length, device=device)
    back = places[:, None] - places[None, :]
    return (back >= 0) & (back < window)


@contextmanager
def document_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model attends within documents while the block runs, its backward pass included; then as before."""
    AttentionInterface.register(NAME, attend_within_documents)
    configs = {id(config): config for module in model.modules() if (config := _attention_config(module)) is not None}
    before = {place: config._attn_implementation for place, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for place, config in configs.items():
            config._attn_implementation = before[place]


def document_inputs(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments of a forward pass over documents of these lengths, end to end; add `input_ids` [1, T]."""
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return {"position_ids": positions[None], "document_lengths": tuple(lengths), "use_cache": False}


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether documents end to end give the logits that each gives alone, up to rounding; if not, the log says why.

    Architectures without positions of their own, with recurrent or convolution layers, or with attention that is not
    transformers' interface do not; nor do models of an encoder and a decoder, whose attention is biased by distances
    within the whole sequence.
    """
    if is_encoder_decoder(model):
        _LOGGER.info("rows of %s are padded, for an encoder and a decoder read them", type(model).__name__)
        return False
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = (7 * torch.arange(1, sum(_PROBE_LENGTHS) + 1, device=model.device)) % vocabulary
    alone_TV = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in ids.split(_PROBE_LENGTHS)])
    try:
        with document_attention(model):
            together_TV = model(input_ids=ids[None], **document_inputs(_PROBE_LENGTHS, ids.device)).logits[0]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        _LOGGER.info("rows of %s are padded, for they cannot lie end to end: %s", type(model).__name__, error)
        return False
    alone_TV, together_TV = alone_TV.float(), together_TV.float()
    spread = (alone_TV - alone_TV.mean(dim=-1, keepdim=True)).abs().max().item()
    tolerance = _TOLERANCE_16_BIT if model.dtype.itemsize == 2 else _TOLERANCE_32_BIT
    error = (together_TV - alone_TV).abs().max().item()
    if not error <= tolerance * spread:
        _LOGGER.info("rows of %s are padded: end to end they see each other (%.3g)", type(model).__name__, error)
        return False
    return True


def _attention_config(module: torch.nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation") else None
