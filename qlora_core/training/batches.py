"""Which rows make up each step, and which of their tokens are trained.

The order is a pure function of (seed, step): a resume needs no position but the step. A row may be a packed one, which
holds several. Knows nothing of models or losses.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from qlora_core.data.dataset import TokenRow

# Rows are sorted by length within pools of this many batches: short enough to keep the order random, long enough that
# a batch holds rows of nearly one length.
POOL_BATCHES = 50


class BatchOrder:
    """The rows of every optimizer step: each epoch visits each row once, in an order drawn from (seed, epoch).

    With `group_by_length`, shuffled rows are sorted by token count within pools of 50 batches, cut into batches, and
    the batches shuffled again. The epoch's last batch may be smaller; no row is left out. Within a batch, rows go from
    long to short, so that its micro-batches pad little; the batch is what one step sums over, so this changes nothing
    but rounding.
    """

    def __init__(self, lengths: Sequence[int], batch_rows: int, *, seed: int, group_by_length: bool) -> None:
        self._lengths = list(lengths)
        self._batch_rows = batch_rows
        self._seed = seed
        self._group_by_length = group_by_length
        self._epoch: tuple[int, list[list[int]]] | None = None
        self.steps_per_epoch = -(-len(self._lengths) // batch_rows)

    def batch(self, step: int) -> list[int]:
        """Indices of the rows of the step taken after `step` steps."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw(epoch))
        return self._epoch[1][position]

    def _draw(self, epoch: int) -> list[list[int]]:
        generator = random.Random(f"order/{self._seed}/{epoch}")
        order = list(range(len(self._lengths)))
        generator.shuffle(order)
        pool_rows = POOL_BATCHES * self._batch_rows
        if self._group_by_length:
            pools = [order[start : start + pool_rows] for start in range(0, len(order), pool_rows)]
            order = [row for pool in pools for row in self._long_first(pool)]
        starts = range(0, len(order), self._batch_rows)
        batches = [self._long_first(order[start : start + self._batch_rows]) for start in starts]
        if self._group_by_length:
            generator.shuffle(batches)
        return batches

    def _long_first(self, rows: list[int]) -> list[int]:
        return sorted(rows, key=lambda row: -self._lengths[row])


@dataclass(frozen=True, slots=True)
class PackedRow(TokenRow):
    """Several rows in one sequence. The first token of each is never trained: nothing before it belongs to its row."""

    row_ids: tuple[str, ...]
    lengths: tuple[int, ...]


def pack(rows: Sequence[TokenRow]) -> PackedRow:
    """Rows end to end, in the given order."""
    return PackedRow(
        id="+".join(row.id for row in rows),
        input_ids=[token for row in rows for token in row.input_ids],
        loss_mask=[trained and place > 0 for row in rows for place, trained in enumerate(row.loss_mask)],
        row_ids=tuple(row.id for row in rows),
        lengths=tuple(len(row.input_ids) for row in rows),
    )


class PackedRows(Sequence[TokenRow]):
    """The packed rows of a training set, each put together when it is asked for.

    Sequence k holds `rows[order[starts[k]]]` to `rows[order[starts[k + 1] - 1]]`; `order` has shape [rows], `starts`
    [sequences + 1].
    """

    def __init__(self, rows: Sequence[TokenRow], order: np.ndarray, starts: np.ndarray) -> None:
        self._rows = rows
        self._order = order
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> PackedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[PackedRow]: ...
    def __getitem__(self, index: int | slice) -> PackedRow | list[PackedRow]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        return pack([self._rows[row] for row in self._order[self._starts[places] : self._starts[places + 1]]])


def trained_tokens(row: TokenRow) -> int:
    """How many tokens of a row are labels: the first one has nothing before it to predict it from."""
    return sum(row.loss_mask[1:])


def labels_of(row: TokenRow) -> list[tuple[int, int]]:
    """(position, token to predict there) for every trained token: position t predicts token t + 1.

    A row's first token is never a label; a row without trained tokens gives an empty list.
    """
    pairs = enumerate(zip(row.input_ids[1:], row.loss_mask[1:], strict=True))
    return [(place, token) for place, (token, trained) in pairs if trained]
