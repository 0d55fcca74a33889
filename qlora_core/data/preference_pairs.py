"""The worse answers of preference pairs in tokens, proven like every other answer. Decides nothing about rows."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.loss_mask import MaskedRow, Refusal, mask_rows
from qlora_core.data.row import Message, Row
from qlora_core.data.window import fit

_LOGGER = logging.getLogger(__name__)


def with_rejected(
    chat: ChatTokenizer,
    rows: Sequence[MaskedRow],
    limit: int,
    over_long: Literal["drop", "cut"],
    lost: Counter[str],
) -> list[MaskedRow]:
    """The rows in their order, those of preference pairs with the tokens and the mask of the worse answer too.

    A row stays without them where the worse answer is not provable or longer than `limit` tokens: as an example it is
    as good as any, but it is no pair. `lost` counts these by rule.
    """
    paired = [masked.row for masked in rows if masked.row.rejected is not None]
    worse = iter(mask_rows(chat, [_ending_worse(row) for row in paired]))
    return [
        masked if masked.row.rejected is None else _joined(masked, next(worse), limit, over_long, lost)
        for masked in rows
    ]


def log_lost_pairs(lost: Counter[str]) -> None:
    """Say how many pairs there could not be, and why; nothing where there were none."""
    if lost:
        reasons = ", ".join(f"{count} {rule}" for rule, count in sorted(lost.items()))
        _LOGGER.warning("%d rows are kept as examples, but not as preference pairs: %s", lost.total(), reasons)


def _ending_worse(row: Row) -> Row:
    last = row.messages[-1]
    messages = (*row.messages[:-1], Message(last.role, row.rejected or "", last.train))
    return replace(row, messages=messages, rejected=None)


def _joined(
    masked: MaskedRow,
    worse: MaskedRow | Refusal,
    limit: int,
    over_long: Literal["drop", "cut"],
    lost: Counter[str],
) -> MaskedRow:
    last = len(masked.row.messages) - 1
    if isinstance(worse, Refusal):
        lost[worse.rule] += 1
        return masked
    fitted = fit(worse, limit, over_long)
    if fitted is None or fitted.turns[-1].message_index < last:
        lost["over_long"] += 1
        return masked
    return replace(masked, rejected_ids=fitted.input_ids, rejected_mask=fitted.loss_mask)
