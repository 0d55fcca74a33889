"""What a trial's batches are made of: rows to learn, or preference pairs; each says what its loss is divided by.

Knows nothing of order, steps or optimizers.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import PreferenceRow, TokenRow
from qlora_core.training.batches import PackedRow, trained_tokens
from qlora_core.training.pack.layout import Part
from qlora_core.training.pack.pack import Pack
from qlora_core.training.preference import PairTerms, answers_of


class Examples(Protocol):
    """The training examples of an objective, by place. `lengths` are their tokens."""

    lengths: list[int]

    def part(self, places: Sequence[int], slot: int, first: int, step: int, params: TrainConfig) -> Part:
        """The examples as rows of a pass; `first` is the place of the first one in the effective batch."""
        ...

    def tokens(self, places: Sequence[int]) -> int:
        """Trained tokens of the examples."""
        ...

    def weight(self, places: Sequence[int]) -> int:
        """What the loss sum over the examples is divided by to give their mean loss."""
        ...

    def ids(self, places: Sequence[int]) -> list[str]:
        """Ids of the rows in the examples."""
        ...


class TokenExamples:
    """Rows, or packed sequences of rows: the loss is the mean over trained tokens."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self._rows = rows
        self.lengths = [len(row.input_ids) for row in rows]

    def part(self, places: Sequence[int], slot: int, first: int, step: int, params: TrainConfig) -> Part:
        """See `Examples`."""
        return Part(slot, [self._rows[place] for place in places], first, step)

    def tokens(self, places: Sequence[int]) -> int:
        """See `Examples`."""
        return sum(trained_tokens(self._rows[place]) for place in places)

    def weight(self, places: Sequence[int]) -> int:
        """The trained tokens."""
        return self.tokens(places)

    def ids(self, places: Sequence[int]) -> list[str]:
        """See `Examples`."""
        rows = [self._rows[place] for place in places]
        return [row_id for row in rows for row_id in (row.row_ids if isinstance(row, PackedRow) else (row.id,))]


class PairExamples:
    """Preference pairs: the loss is the mean over pairs.

    What the base alone thinks of a pair is computed when a trial first meets it, in a pass of its own, and kept: it is
    the same for all trials, and depends neither on what else is in a batch nor on when training was interrupted.
    """

    def __init__(self, pairs: Sequence[PreferenceRow], pack: Pack) -> None:
        self._pairs = pairs
        self._pack = pack
        self._known: dict[int, torch.Tensor] = {}
        self.lengths = [len(pair.input_ids) + len(pair.rejected_ids) for pair in pairs]

    def part(self, places: Sequence[int], slot: int, first: int, step: int, params: TrainConfig) -> Part:
        """See `Examples`."""
        answers = [answer for place in places for answer in answers_of(self._pairs[place])]
        reference_N2 = torch.stack([self._reference(place) for place in places])
        terms = PairTerms(reference_N2, params.dpo_beta, params.dpo_label_smoothing)
        return Part(slot, answers, 2 * first, step, terms)

    def tokens(self, places: Sequence[int]) -> int:
        """Of both answers."""
        return sum(trained_tokens(answer) for place in places for answer in answers_of(self._pairs[place]))

    def weight(self, places: Sequence[int]) -> int:
        """The pairs."""
        return len(places)

    def ids(self, places: Sequence[int]) -> list[str]:
        """See `Examples`."""
        return [self._pairs[place].id for place in places]

    def _reference(self, place: int) -> torch.Tensor:
        """ln p of both answers under the base alone, float64 [2]."""
        if place not in self._known:
            self._known[place] = self._pack.base_log_probs(answers_of(self._pairs[place]))
        return self._known[place]
