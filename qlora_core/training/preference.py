"""Direct preference optimisation: the loss of pairs of answers under an adapter, against the base it lies on.

Rafailov et al. 2023 (Direct Preference Optimization: Your Language Model is Secretly a Reward Model), equation 7. Pure
functions of log-probabilities and rows; knows nothing of models or of where the numbers come from. Shapes: N pairs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from qlora_core.data.dataset import PreferenceRow, TokenRow
from qlora_core.errors import TrainingError
from qlora_core.training.batches import trained_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairTerms:
    """What the loss of N pairs needs beside their log-probabilities under the adapter.

    `reference_N2`: float64, ln p of the better and the worse answer under the base alone. `label_smoothing`: the share
    of pairs taken to be labelled the wrong way round (Mitchell 2023, A note on DPO with noisy preferences).
    """

    reference_N2: torch.Tensor
    beta: float
    label_smoothing: float = 0.0


def reward_margins(log_probs_N2: torch.Tensor, terms: PairTerms) -> torch.Tensor:
    """[N]: by how much the better answer's implicit reward, beta (ln p - ln p_ref), is above the worse one's."""
    gains_N2 = log_probs_N2 - terms.reference_N2.to(log_probs_N2)
    return terms.beta * (gains_N2[:, 0] - gains_N2[:, 1])


def pair_losses(log_probs_N2: torch.Tensor, terms: PairTerms) -> torch.Tensor:
    """[N]: -(1 - e) ln sigmoid(m) - e ln sigmoid(-m), with m the reward margin and e the label smoothing.

    `log_probs_N2`: ln p of both answers, summed over their trained tokens. ln 2 for an adapter that changes nothing.
    """
    margins_N = reward_margins(log_probs_N2, terms)
    smoothing = terms.label_smoothing
    losses_N = -(1 - smoothing) * logsigmoid(margins_N)
    return losses_N - smoothing * logsigmoid(-margins_N) if smoothing else losses_N


def loss_sum(nats_P: torch.Tensor, rows: Sequence[TokenRow], terms: PairTerms | None) -> torch.Tensor:
    """The loss summed over a part: of its tokens, or with `terms` of its pairs, whose answers lie in turn in `rows`.

    `nats_P`: -ln p of every trained token of the rows, in order.
    """
    if terms is None:
        return nats_P.sum()
    # A sum of many nats in float32 would be as coarse as what one step changes
    log_probs_N2 = row_log_probs(nats_P, rows).view(-1, 2)
    return pair_losses(log_probs_N2, terms).sum().to(nats_P.dtype)


def row_log_probs(nats_P: torch.Tensor, rows: Sequence[TokenRow]) -> torch.Tensor:
    """[rows] in float64: ln p of each row's trained tokens, from -ln p of every trained token of all rows."""
    return -torch.stack([part.sum() for part in nats_P.double().split([trained_tokens(row) for row in rows])])


def answers_of(row: PreferenceRow) -> tuple[TokenRow, TokenRow]:
    """The better and the worse answer, each as a row."""
    return row, TokenRow(row.id, row.rejected_ids, row.rejected_mask)


def preference_rows(rows: Sequence[TokenRow], split: str) -> list[PreferenceRow]:
    """The rows that are preference pairs with a trained token in both answers; how many were left out is logged.

    Raises:
        TrainingError: there is none.
    """
    pairs = [row for row in rows if isinstance(row, PreferenceRow)]
    pairs = [row for row in pairs if all(trained_tokens(answer) for answer in answers_of(row))]
    if not pairs:
        raise TrainingError(
            f"train.objective is dpo, but none of the {len(rows)} {split} rows is a preference pair: the rejected "
            "answer is missing. Name sources whose records hold `chosen` and `rejected`, or use train.objective: sft; "
            "sets curated by an older version are to be curated again"
        )
    if len(pairs) < len(rows):
        logger.warning(
            "%d of %d %s rows are no preference pairs and are left out", len(rows) - len(pairs), len(rows), split
        )
    return pairs
