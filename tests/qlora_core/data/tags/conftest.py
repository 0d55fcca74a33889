"""Rows made on the spot."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qlora_core.data.row import Draft, Message, Row, make_row

MakeRow = Callable[..., Row]


@pytest.fixture(scope="session")
def row() -> MakeRow:
    """`row("question", "answer", ...)` makes a row of turns in turn, the assistant's trained."""

    def make(*turns: str, source: str = "rows.jsonl", line: int = 1, **fields: Any) -> Row:
        roles: Sequence[Any] = ("user", "assistant")
        messages = [Message(roles[i % 2], text, train=i % 2 == 1) for i, text in enumerate(turns)]
        return make_row(Draft(messages, **fields), source, line)

    return make
