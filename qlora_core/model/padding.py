"""Rows of unlike length in one batch. Knows tokens, not what reads them.

Shapes, as suffixes of names: b rows of a batch, t tokens.
"""

from collections.abc import Sequence

import torch

PADDING_ID = 0
"""Any valid id does: the attention mask hides it, and it must not be the stop token."""


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [b, t] and attention mask [b, t] (1: a token of the row), the padding behind each row's tokens."""
    longest = max(len(row) for row in rows)
    ids_bt = torch.full((len(rows), longest), PADDING_ID, dtype=torch.long)
    attention_bt = torch.zeros((len(rows), longest), dtype=torch.long)
    for place, row in enumerate(rows):
        ids_bt[place, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        attention_bt[place, : len(row)] = 1
    return ids_bt.to(device), attention_bt.to(device)
