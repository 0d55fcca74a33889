"""The canonical row: one conversation, whatever format it came in. Knows nothing of files, templates or tokens."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Literal

from qlora_core.data.text_form import spaced
from qlora_core.digest import digest_bytes
from qlora_core.errors import DataError

Role = Literal["system", "user", "assistant"]

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


class RowError(DataError):
    """A row that cannot be used; it goes to quarantine.

    Its message is `kind: detail`. `kind` comes from a small set and is what the funnel counts; the detail names the
    value at fault, never the conversation's text.
    """

    @property
    def kind(self) -> str:
        """The part of the message before the first colon."""
        return str(self).partition(":")[0]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train` is True only for assistant turns whose tokens carry loss."""

    role: Role
    content: str
    train: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """What a reader makes of one record, before the rules that hold for every format."""

    messages: Sequence[Message]
    category: str | None = None
    licence: str | None = None
    generator: str | None = None
    language: str | None = None
    tools: str | None = None
    rejected: str | None = None
    group_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation that opens with an optional system turn and a user turn, and ends on an assistant turn.

    `id` is the SHA-256 of the messages and, where the row has them, of its tools and rejected answer, so it does not
    depend on where the row was found. `line` counts from 1 and is the line of the file where the record starts.
    `trimmed` counts the turns after the last answer that were left out. `tools` is the canonical JSON of the tools a
    conversation may call; `rejected` the worse answer of a preference pair, whose better one is the last turn;
    `group_keys` name what the row shares with others that must lie on its side of the split (a tree, a story).
    `language` is what the data says, not what was measured.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    line: int
    category: str | None = None
    licence: str | None = None
    generator: str | None = None
    trimmed: int = 0
    language: str | None = None
    tools: str | None = None
    rejected: str | None = None
    group_keys: tuple[str, ...] = ()

    @property
    def opening(self) -> str:
        """The first user turn."""
        return next(message.content for message in self.messages if message.role == "user")

    @property
    def group_key(self) -> str:
        """What must not lie on two sides of the split: the opening prompt, its spacing evened out.

        Every path of a conversation tree opens with the tree's root, so a tree is in one group as well.
        """
        return spaced(self.opening)

    @property
    def conversation_key(self) -> tuple[tuple[str, str], ...]:
        """Equal for two rows that say the same in the same roles, spacing aside."""
        return tuple((message.role, spaced(message.content)) for message in self.messages)


def row_id(messages: Sequence[Message], tools: str | None = None, rejected: str | None = None) -> str:
    """SHA-256 over roles, contents, train flags, tools and rejected answer, 64 hex digits.

    With neither tools nor a rejected answer it is over the list of messages alone.
    """
    turns = turns_json((message.role, message.content, message.train) for message in messages)
    if tools is None and rejected is None:
        return digest_bytes(turns.encode())
    return digest_bytes(f'{{"messages":{turns},"rejected":{text_json(rejected)},"tools":{text_json(tools)}}}'.encode())


def turns_json(turns: Iterable[tuple[str, str, bool]]) -> str:
    """The canonical JSON of a list of turns, each a role, a text and whether it is trained.

    Rows are digested so often that going through `canonical_json` would tell.
    """
    return f"[{','.join([turn_json(role, text, train) for role, text, train in turns])}]"


def turn_json(role: str, text: str, train: bool) -> str:
    """One turn of `turns_json`."""
    return f"[{encode_basestring(role)},{encode_basestring(text)},{'true' if train else 'false'}]"


def text_json(text: str | None) -> str:
    """The canonical JSON of a text or of None."""
    return "null" if text is None else encode_basestring(text)


def make_row(draft: Draft, source: str, line: int) -> Row:
    """Check a draft against the rules of `Row`, trim what follows its last answer, and give it its identity.

    Raises RowError for an empty or unreadable turn, a system turn that is not first, a conversation that does not open
    with the user, and one without an assistant turn to train on.
    """
    messages = [message for message in draft.messages if message.content or message.role != "system"]
    for number, message in enumerate(messages, start=1):
        _check_turn(number, message)
    last_answer = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if last_answer < 0:
        raise RowError(f"no assistant turn: roles are {[message.role for message in messages]}")
    kept = tuple(messages[: last_answer + 1])
    first = kept[1] if kept[0].role == "system" else kept[0]
    if first.role != "user":
        raise RowError("no opening user turn: the assistant speaks first")
    if not any(message.train for message in kept):
        raise RowError("nothing to train: every assistant turn has weight 0")
    _check_labels(draft)
    return Row(
        id=row_id(kept, draft.tools, draft.rejected),
        messages=kept,
        source=source,
        line=line,
        category=draft.category,
        licence=draft.licence,
        generator=draft.generator,
        trimmed=len(messages) - len(kept),
        language=draft.language,
        tools=draft.tools,
        rejected=draft.rejected,
        group_keys=draft.group_keys,
    )


def _check_turn(number: int, message: Message) -> None:
    if not message.content:
        kind = "empty answer" if message.role == "assistant" else "empty turn"
        raise RowError(f"{kind}: turn {number} ({message.role}) holds no text")
    if message.role == "system" and number > 1:
        raise RowError(f"misplaced system turn: turn {number}; only the first turn may be the system's")
    if fault := _text_fault(message.content):
        raise RowError(f"invalid text: turn {number} ({message.role}) holds {fault}")
    if message.train and message.role != "assistant":
        raise RowError(f"wrong weight: turn {number} ({message.role}) asks for loss; only assistant turns are trained")


def _check_labels(draft: Draft) -> None:
    for name in ("category", "licence", "generator", "language", "tools", "rejected", "group_keys"):
        value = getattr(draft, name)
        for text in (value or "",) if name != "group_keys" else value:
            if fault := _text_fault(text):
                raise RowError(f"invalid text: {name} holds {fault}")


def _text_fault(text: str) -> str | None:
    # NUL ends a text for much of what reads it later: C libraries, numpy, databases.
    if "\0" in text:
        return "a NUL character"
    return "half of a surrogate pair" if not text.isascii() and LONE_SURROGATE.search(text) else None
