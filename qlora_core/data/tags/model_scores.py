"""How hard a row's last answer is for the base model: its perplexity and its instruction-following difficulty.

    perplexity = exp(mean over the answer's tokens of -ln p(token | the conversation up to it))
    ifd        = perplexity / exp(mean over the same tokens of -ln p(token | the answer up to it))

Ling Li et al., "From Quantity to Quality" (2023), equations 2 to 4, as a ratio of perplexities. Above 1 the prompt does
not help; the highest below 1 are the rows from which there is something to learn. Long answers and prose score higher
than short ones and code, so rank within groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from qlora_core.data.row import Row
from qlora_core.data.tags.tagger import Tagged, fingerprint_of, tagged

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora_core.data.chat_template import ChatTokenizer
    from qlora_core.data.loss_mask import MaskedRow

SCHEMA = pa.schema([("perplexity", pa.float64()), ("ifd", pa.float64())])

_VERSION = 2
# With the rows it is padded with, a score changes from its eighth digit on: what the cache holds already decides which
# rows are scored together, and must not show in a column. Only one that lies on the border of two roundings still may.
_SIGNIFICANT_DIGITS = 5


@dataclass(frozen=True, slots=True)
class _Scored:
    input_ids: list[int]
    loss_mask: list[bool]


class ModelScoresTagger:
    """Columns `perplexity` and `ifd` (float64) of the last trained answer, in its context of all turns before it.

    The tokens are the answer's own, without the stop token. For the second loss they stand alone, after the tokenizer's
    BOS; where it has none, the first token is predicted from nothing, so neither loss counts it. Both are rounded to 5
    significant digits. Nothing is ever cut: a row that the mask proof refuses, that is longer than `max_positions`
    tokens, or has no token that counts, has failed and gets nulls. `base_digest` stands for the model's weights and the
    tokenizer's files, in the fingerprint.

    The model is used as it is: put it into eval mode, on the device where it shall run.
    """

    name = "model_scores"
    cached = True
    schema = SCHEMA

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        chat: "ChatTokenizer",
        *,
        base_digest: str,
        max_positions: int,
        batch_size: int = 8,
    ) -> None:
        self._model = model
        self._chat = chat
        self._max_positions = max_positions
        self._batch_size = batch_size
        settings = [base_digest, str(chat.tokenizer.chat_template), max_positions, str(model.dtype)]
        self.fingerprint = fingerprint_of(self.name, _VERSION, SCHEMA, settings)

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """Both scores of each row: two forward passes a row, `batch_size` rows of like length at a time."""
        from qlora_core.data.loss_mask import Refusal, mask_rows
        from qlora_core.model.loss import sequence_losses

        pairs: list[tuple[_Scored, _Scored] | None] = [
            None if isinstance(outcome, Refusal) else self._pair(outcome) for outcome in mask_rows(self._chat, rows)
        ]
        scored = [one for pair in pairs if pair is not None for one in pair]
        losses = iter(sequence_losses(self._model, scored, batch_size=self._batch_size))
        perplexities: list[float | None] = []
        difficulties: list[float | None] = []
        for pair in pairs:
            scores = None if pair is None else _scores(next(losses), next(losses))
            perplexities.append(scores[0] if scores else None)
            difficulties.append(scores[1] if scores else None)
        return tagged(SCHEMA, [perplexities, difficulties], [score is None for score in perplexities])

    def _pair(self, masked: "MaskedRow") -> tuple[_Scored, _Scored] | None:
        """The last answer after its conversation, and alone; None if it cannot be scored whole."""
        turn = masked.turns[-1]
        answer = list(masked.input_ids[turn.start : turn.stop])
        bos = self._chat.bos_token_id
        opening = [] if bos is None else [bos]
        counted = [True] * len(answer)
        if not opening:
            counted[:1] = [False]
        if turn.stop > self._max_positions or not any(counted):
            return None
        in_context = _Scored(list(masked.input_ids[: turn.stop]), [False] * turn.start + counted)
        return in_context, _Scored(opening + answer, [False] * len(opening) + counted)


def _scores(in_context: tuple[float, int], alone: tuple[float, int]) -> tuple[float, float] | None:
    """Perplexity and difficulty from two (sum of nats, tokens); None where they have no finite value."""
    try:
        perplexity = math.exp(in_context[0] / in_context[1])
        difficulty = math.exp(in_context[0] / in_context[1] - alone[0] / alone[1])
    except OverflowError:
        return None
    finite = math.isfinite(perplexity) and math.isfinite(difficulty)
    return (_rounded(perplexity), _rounded(difficulty)) if finite else None


def _rounded(score: float) -> float:
    return float(f"{score:.{_SIGNIFICANT_DIGITS}g}")
