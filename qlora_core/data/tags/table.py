"""The tags of a set of rows as one table, aligned with them. Knows no tagger."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, slots=True)
class TagStats:
    """Of one tagger: rows tagged now, rows whose tags were found in the cache, and rows that got nulls by a failure."""

    computed: int
    cached: int
    failed: int


@dataclass(frozen=True, slots=True)
class TagTable:
    """A line for every row, in the rows' order; `stats` by tagger."""

    table: pa.Table
    stats: Mapping[str, TagStats] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The columns."""
        return self.table.column_names

    @property
    def numeric_names(self) -> list[str]:
        """The columns that have a size, and so may be ranked or limited by a range."""
        return [f.name for f in self.table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]

    def with_column(self, name: str, values: pa.Array | pa.ChunkedArray) -> "TagTable":
        """The same with one column more, aligned with the rows. Raises ValueError for a name that is taken."""
        if name in self.names:
            raise ValueError(f"the tag {name!r} is there already; the tags are {', '.join(self.names)}")
        return TagTable(self.table.append_column(name, values), self.stats)

    def take(self, positions: np.ndarray) -> "TagTable":
        """The lines at `positions` (int64), in that order."""
        return TagTable(self.table.take(pa.array(positions, type=pa.int64())), self.stats)
