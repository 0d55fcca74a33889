"""Rows at chosen positions of a sequence, a batch at a time where the sequence can. Knows no row's content."""

from collections.abc import Iterable, Sequence

import numpy as np

from qlora_core.data.row import Row


def rows_at(rows: Sequence[Row], positions: np.ndarray) -> Iterable[Row]:
    """The rows at `positions`, in that order, to go through once.

    A sequence over Arrow batches has `select`, which makes rows a batch at a time; any other is asked row by row.
    """
    select = getattr(rows, "select", None)
    return select(positions) if select is not None else (rows[position] for position in positions.tolist())
