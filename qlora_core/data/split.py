"""Which side of the split a row is on, and that no prompt is on two. Knows nothing of tokens or files."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, TypeVar

from qlora_core.config.curation import SplitConfig
from qlora_core.data.row import Message
from qlora_core.data.text_form import folded

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")


class Conversation(Protocol):
    """What the split looks at."""

    @property
    def id(self) -> str:
        """Unique among the rows compared."""
        ...

    @property
    def messages(self) -> Sequence[Message]:
        """The turns, at least one of them the user's."""
        ...


Member = TypeVar("Member", bound=Conversation)


def side_of(group_key: str, config: SplitConfig) -> Side:
    """The side of a group: its salted hash as a number in [0, 1), test first, then validation, the rest is train.

    It depends on nothing but the key and the config, so added rows move nobody.
    """
    digest = hashlib.sha256(f"{config.salt}\0{group_key}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < config.test:
        return "test"
    return "validation" if place < config.test + config.validation else "train"


def user_turns(messages: Iterable[Message]) -> list[str]:
    """The folded user turns, in order; the first is the prompt."""
    return [folded(message.content) for message in messages if message.role == "user"]


class HeldOut:
    """The prompts and user turns of held-out rows, to find the rows that would give them away."""

    def __init__(self) -> None:
        self._prompts: dict[str, str] = {}
        self._turns: dict[str, str] = {}

    def add(self, row: Conversation) -> None:
        """Hold this row out."""
        turns = user_turns(row.messages)
        self._prompts.setdefault(turns[0], row.id)
        for turn in turns:
            self._turns.setdefault(turn, row.id)

    def match(self, row: Conversation) -> str | None:
        """The id of a held-out row that `row` leaks, or None.

        It leaks if its prompt is any user turn of a held-out row, or any of its user turns is a held-out prompt; case,
        spacing and punctuation aside. Later turns alone ("Go on.") are not compared with each other.
        """
        turns = user_turns(row.messages)
        if turns[0] in self._turns:
            return self._turns[turns[0]]
        return next((self._prompts[turn] for turn in turns if turn in self._prompts), None)


def find_leaks(
    train: Sequence[Member], validation: Sequence[Member], test: Sequence[Member]
) -> list[tuple[Member, str]]:
    """The rows to leave out, each with the id of the held-out row it matches.

    The test side keeps all its rows; validation gives way to test, train gives way to both.
    """
    held = HeldOut()
    for row in test:
        held.add(row)
    leaks = [(row, match) for row in validation if (match := held.match(row)) is not None]
    leaking = {row.id for row, _ in leaks}
    for row in validation:
        if row.id not in leaking:
            held.add(row)
    return leaks + [(row, match) for row in train if (match := held.match(row)) is not None]
