"""Exact de-duplication: rows that say the same, spacing aside, keep one survivor."""

from collections.abc import Mapping, Sequence

from qlora_core.data.ledger import Dropped
from qlora_core.data.row import Row


def drop_duplicates(rows: Sequence[Row], source_order: Mapping[str, int]) -> tuple[list[Row], list[Dropped]]:
    """One row of every group with equal `conversation_key`, and the others with the id of the one kept.

    Equal prompts with other answers are not duplicates. The survivor is the row from the earliest source, then the one
    of lowest id, then the first line: shuffling the lines of a file changes nothing that is kept. Survivors come back
    in that order.
    """
    survivors: dict[tuple[tuple[str, str], ...], Row] = {}
    dropped = []
    for row in sorted(rows, key=lambda row: (source_order[row.source], row.id, row.category or "", row.line)):
        kept = survivors.setdefault(row.conversation_key, row)
        if kept is not row:
            dropped.append(Dropped(row.id, row.source, row.line, "duplicate", matched_id=kept.id))
    return list(survivors.values()), dropped
