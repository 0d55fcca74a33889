"""Keeps documents that share a sequence apart: what to hand a model beside the tokens, and a check that it works.

Positions start at 0 in every document, and an explicit block-diagonal causal mask goes with them, which transformers
makes for the model's own kinds of attention (full, sliding window, chunked) and its attention code (sdpa, eager, flex).
Positions alone do not do: with a cache, or with a mask of ones, transformers ignores where they start anew.

Knows nothing of rows, losses or which documents belong together. Shapes: B sequences, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from qlora_core.errors import ModelError

_PROBE_LENGTHS = (6, 5)
# Rounding of a deep model, as a share of its logits' spread; documents that see each other differ by far more.
_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 0.05


def document_positions(lengths: Sequence[int], width: int) -> list[int]:
    """Position ids of one sequence of `width` tokens that holds documents of these lengths, then padding.

    Each document counts from 0, and so does the padding: it is one more document, which the others cannot see.
    """
    padding = width - sum(lengths)
    return [place for length in (*lengths, padding) for place in range(length)]


def isolating_inputs(model: PreTrainedModel, position_ids_BT: torch.Tensor) -> dict[str, Any]:
    """Arguments of the model's forward pass by which no document sees another; add `input_ids`.

    A document begins wherever a position is not one more than that before it. Attention needs B T T booleans under
    sdpa, as many numbers of the model's precision under eager attention.
    """
    shape_BTH = torch.empty((*position_ids_BT.shape, 0), dtype=model.dtype, device=position_ids_BT.device)
    masks = create_masks_for_generate(
        config=model.config,
        inputs_embeds=shape_BTH,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids_BT,
    )
    if isinstance(masks, dict) and len(masks) == 1:
        # Models with one kind of attention take the mask itself
        (masks,) = masks.values()
    return {"position_ids": position_ids_BT, "attention_mask": masks, "use_cache": False}


def check_isolation(model: PreTrainedModel) -> None:
    """Run two short documents in one sequence and each alone: the logits must be the same up to rounding.

    Raises:
        ModelError: the model takes no positions or no mask of its own (ALiBi models), or lets documents see each other
            (recurrent and convolution layers do).
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{name} takes no position_ids, so rows that share a sequence cannot be kept apart; set "
            "data.packing.enabled to false"
        )
    documents = _probe_documents(model)
    with torch.no_grad():
        try:
            together_TV = _packed_logits(model, documents)
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{name} cannot take a mask that keeps rows of a sequence apart ({error}); set data.packing.enabled to "
                "false"
            ) from error
        alone_TV = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents]).float()
    spread = (alone_TV - alone_TV.mean(dim=-1, keepdim=True)).abs().max().item()
    error = (together_TV - alone_TV).abs().max().item()
    tolerance = _TOLERANCES.get(model.dtype, _TOLERANCE_16_BIT) * spread
    if not error <= tolerance:
        raise ModelError(
            f"{name} lets rows that share a sequence see each other: logits are off by {error:.3g} where rounding "
            f"explains {tolerance:.3g}; set data.packing.enabled to false"
        )


def _probe_documents(model: PreTrainedModel) -> list[torch.Tensor]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = (7 * torch.arange(1, sum(_PROBE_LENGTHS) + 1, device=model.device)) % vocabulary
    return list(ids.split(_PROBE_LENGTHS))


def _packed_logits(model: PreTrainedModel, documents: list[torch.Tensor]) -> torch.Tensor:
    """Logits [T, V] of the documents in one sequence that ends in padding."""
    ids_T = torch.cat(documents)
    ids_BT = torch.nn.functional.pad(ids_T, (0, 2))[None]
    positions = document_positions([len(ids) for ids in documents], ids_BT.shape[1])
    inputs = isolating_inputs(model, torch.tensor([positions], device=ids_BT.device))
    return model(input_ids=ids_BT, **inputs).logits[0, : len(ids_T)].float()
