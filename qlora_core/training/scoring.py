"""The validation loss of a slot's adapter. Knows nothing of training."""

import math
from collections.abc import Sequence

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.model.loss import sequence_losses
from qlora_core.training.pack.pack import Pack

# One size for all trials, so that their validation losses are sums of the same batches
VALIDATION_BATCH_ROWS = 8


def validation_loss(pack: Pack, slot: int, rows: Sequence[TokenRow], trial_id: str, step: int) -> float:
    """Mean of -ln p over all trained tokens of the rows, in nats per token.

    Raises:
        TrainingError: it is not finite; trial and step are named.
    """
    with pack.only(slot):
        losses = sequence_losses(pack.base, rows, batch_size=VALIDATION_BATCH_ROWS)
    loss = sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)
    if not math.isfinite(loss):
        raise TrainingError(
            f"the validation loss of trial {trial_id} is {loss} after step {step}; lower train.learning_rate"
        )
    return loss
