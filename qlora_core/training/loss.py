"""The training loss of an effective batch: one token-weighted mean, accumulated over micro-batches.

    loss = (sum over all trained tokens of the effective batch of -ln p(token)) / (number of those tokens)

It is never a mean of micro-batch means, which would weigh a token by its neighbours. Knows nothing of adapters,
optimizers or trials. Shapes: B rows, T positions, K kept positions, V vocabulary.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_core.model.packed_attention import isolating_inputs
from qlora_core.training.batches import IGNORE_INDEX, MicroBatch


def loss_sum(base: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Sum of -ln p over the micro-batch's trained tokens, in nats, at least in float32.

    Zero trained tokens give 0. Logits are made only where some row of the batch has a label, if the model can.
    Rows packed into one sequence do not see each other.
    """
    labels_BK = batch.labels_BT
    if batch.position_ids_BT is None:
        options: dict[str, Any] = {"attention_mask": batch.attention_mask_BT, "use_cache": False}
    else:
        options = isolating_inputs(base, batch.position_ids_BT)
    if _keeps_logits(type(base)):
        kept_K = (labels_BK != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
        labels_BK = labels_BK[:, kept_K]
        options["logits_to_keep"] = kept_K
    logits_BKV = base(input_ids=batch.input_ids_BT, **options).logits
    if logits_BKV.dtype in (torch.float16, torch.bfloat16):
        logits_BKV = logits_BKV.float()
    return functional.cross_entropy(
        logits_BKV.flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


@functools.cache
def _keeps_logits(model_class: type[PreTrainedModel]) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def accumulate_gradients(base: PreTrainedModel, batches: Iterable[MicroBatch], trained_tokens: int) -> list[float]:
    """Add the gradients of the effective batch's loss to the parameters; one forward and backward per micro-batch.

    `trained_tokens` is the number of trained tokens of the whole effective batch, at least 1. Returns the raw loss sum
    in nats of each micro-batch, finite or not.
    """
    sums = []
    for batch in batches:
        loss = loss_sum(base, batch)
        (loss / trained_tokens).backward()
        sums.append(loss.detach())
    # Read once at the end: every read waits for a GPU
    return torch.stack(sums).double().tolist()
