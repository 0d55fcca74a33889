"""What happens to a row that is longer than the window. Knows nothing of how rows were tokenized."""

from dataclasses import replace
from typing import Literal

from qlora_core.data.loss_mask import MaskedRow


def fit(masked: MaskedRow, limit: int, policy: Literal["drop", "cut"]) -> MaskedRow | None:
    """The row within `limit` tokens, or None if it is to be dropped.

    A row that fits comes back as it is. `cut` keeps the start: answers that end inside the window keep their stop
    token, the one that is cut is trained without one, later turns go. A row whose window holds no trained token is
    dropped.
    """
    if len(masked.input_ids) <= limit:
        return masked
    turns = tuple(turn for turn in masked.turns if turn.start < limit)
    if policy == "drop" or not turns:
        return None
    return replace(
        masked,
        row=replace(masked.row, messages=masked.row.messages[: turns[-1].message_index + 1]),
        input_ids=masked.input_ids[:limit],
        loss_mask=masked.loss_mask[:limit],
        turns=turns,
    )
