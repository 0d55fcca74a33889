"""The validation loss of a slot's adapter, on rows or on preference pairs. Knows nothing of training."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import PreferenceRow, TokenRow
from qlora_core.errors import TrainingError
from qlora_core.model.loss import sequence_losses
from qlora_core.training.pack.pack import Pack
from qlora_core.training.preference import PairTerms, answers_of, pair_losses, reward_margins

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
    _check_finite(loss, trial_id, step)
    return loss


class PreferenceScore(NamedTuple):
    """Mean pair loss (nats), and the share of pairs whose better answer has the higher implicit reward."""

    loss: float
    accuracy: float


class ValidationPairs:
    """Preference pairs to score adapters on. What the base alone thinks of them is computed at the first score."""

    def __init__(self, pairs: Sequence[PreferenceRow]) -> None:
        self._answers = [answer for pair in pairs for answer in answers_of(pair)]
        self._reference_N2: torch.Tensor | None = None

    def score(self, pack: Pack, slot: int, params: TrainConfig, trial_id: str, step: int) -> PreferenceScore:
        """The adapter in the slot on all pairs.

        Raises:
            TrainingError: the loss is not finite; trial and step are named.
        """
        if self._reference_N2 is None:
            self._reference_N2 = self._log_probs(pack)  # outside of `only`, the base answers alone
        with pack.only(slot):
            log_probs_N2 = self._log_probs(pack)
        terms = PairTerms(self._reference_N2, params.dpo_beta, params.dpo_label_smoothing)
        loss = pair_losses(log_probs_N2, terms).mean().item()
        _check_finite(loss, trial_id, step)
        return PreferenceScore(loss, (reward_margins(log_probs_N2, terms) > 0).double().mean().item())

    def _log_probs(self, pack: Pack) -> torch.Tensor:
        losses = sequence_losses(pack.base, self._answers, batch_size=VALIDATION_BATCH_ROWS)
        return -torch.tensor([nats for nats, _ in losses], dtype=torch.float64).view(-1, 2)


def _check_finite(loss: float, trial_id: str, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the validation loss of trial {trial_id} is {loss} after step {step}; lower train.learning_rate"
        )
