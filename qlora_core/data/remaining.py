"""The rows that are still in, with their tags, and the ledger of those that left. Knows no rule."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from qlora_core.data.ledger import Dropped
from qlora_core.data.memory import return_memory
from qlora_core.data.row import Row
from qlora_core.data.row_store import RowStore, RowView
from qlora_core.data.tags.table import TagTable


class Remaining:
    """`rows` and `tags` are aligned, `tags` empty until rows are tagged; every row that left is in `dropped`, once."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self.rows: RowView = store.select(np.arange(len(store)))
        self.tags = TagTable(pa.table({}))
        self.dropped: list[Dropped] = []

    def keep(self, positions: np.ndarray, dropped: Iterable[Dropped]) -> None:
        """Go on with the rows at `positions`, in that order; the others are in `dropped`."""
        self.rows = self.rows.select(positions)
        if self.tags.names:
            self.tags = self.tags.take(positions)
        self.dropped += dropped

    def in_order(self) -> None:
        """Go on with the rows as they lie in the store, so that the next of them are near; no tags may be there yet."""
        self.rows = self._store.select(np.sort(self.rows.positions))

    def replace(self, positions: np.ndarray, rows: Iterable[Row]) -> None:
        """Put `rows`, one for each of `positions` (int64), in the place of those there; no other row is copied."""
        changed = RowStore(rows)
        places = self.rows.positions.copy()
        places[positions] = len(self._store) + np.arange(len(changed))
        self._store = RowStore.concatenate([self._store, changed])
        self.rows = self._store.select(places)

    def forget(self) -> None:
        """Let go of the rows and their tags once they are written and summed up; the ledger stays."""
        self._store = RowStore()
        self.tags = TagTable(pa.table({}))
        self.rows = self._store.select(np.empty(0, np.int64))
        return_memory()

    def numbers(self, name: str) -> np.ndarray:
        """A numeric tag of all rows, float64; NaN where a row has none."""
        column = self.tags.table.column(name).combine_chunks().cast(pa.float64())
        return column.fill_null(np.nan).to_numpy(zero_copy_only=False)
