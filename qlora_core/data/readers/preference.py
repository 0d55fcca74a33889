"""Preference pairs: a better and a worse answer to the same turns. The row is the better conversation.

The answers are texts beside a prompt, message lists, or transcripts of `Human:` and `Assistant:` as HH-RLHF has them. A
pair speaks of its last answer only, so no earlier one is trained.
"""

import re
from collections.abc import Sequence

from qlora_core.data.readers.format import (
    Fields,
    Format,
    first_present,
    make_draft,
    read_optional_text,
    read_text,
    type_name,
)
from qlora_core.data.readers.messages import read_turns
from qlora_core.data.row import Draft, Message, Role, RowError
from qlora_core.data.text_form import join_input, strip_alpaca_wrapper

PROMPT_FIELDS = ("prompt", "question", "query", "instruction", "input")
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def _matches(fields: Fields) -> bool:
    return "chosen" in fields and "rejected" in fields


def _read(fields: Fields) -> Draft:
    if not _matches(fields):
        raise RowError(f"missing field: chosen and rejected; got {sorted(fields)}")
    opening = _opening(fields)
    chosen, rejected = (_conversation(fields[name], name, opening) for name in ("chosen", "rejected"))
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1].role != "assistant":
            raise RowError(f"no assistant turn: {name} does not end on an answer")
        if not turns[-1].content:
            raise RowError(f"empty answer: {name} holds no text")
    if _said(chosen[:-1]) != _said(rejected[:-1]):
        raise RowError(
            f"diverging pair: chosen and rejected differ before their last answers ({_where(chosen, rejected)})"
        )
    shared = [Message(message.role, message.content) for message in chosen[:-1]]
    return make_draft(fields, [*shared, Message("assistant", chosen[-1].content, train=True)], rejected[-1].content)


def _opening(fields: Fields) -> list[Message]:
    """The turns that both answers follow, where they are given apart."""
    name = first_present(fields, PROMPT_FIELDS)
    if name is None or fields[name] is None:
        return []
    if isinstance(fields[name], list):
        return read_turns(fields[name])
    text = read_text(fields[name], name)
    if name == "instruction":
        return [Message("user", join_input(text, read_optional_text(fields, "input", "context")))]
    turns = _transcript(text)
    if turns and turns[-1].role == "assistant" and not turns[-1].content:
        turns.pop()
    return turns or [Message("user", strip_alpaca_wrapper(text))]


def _conversation(value: object, name: str, opening: Sequence[Message]) -> list[Message]:
    if isinstance(value, list):
        turns = read_turns(value)
    elif isinstance(value, str):
        turns = _transcript(value) or [Message("assistant", value.strip())]
    else:
        raise RowError(f"wrong type: {name} is {type_name(value)}, neither a text nor a list of turns")
    if not any(turn.role == "user" for turn in turns):
        return [*opening, *turns]
    if opening and _said(opening)[-1] not in _said(turns):
        raise RowError(f"diverging pair: {name} is another conversation than the prompt's")
    return turns


def _transcript(text: str) -> list[Message]:
    """The turns of a text that opens with a speaker's name; none for any other text."""
    marks = list(_SPEAKER.finditer(text.strip()))
    if not marks or marks[0].start() > 0:
        return []
    ends = [*(mark.start() for mark in marks[1:]), None]
    return [
        Message(_ROLES[mark[1]], text.strip()[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
    ]


def _said(turns: Sequence[Message]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


def _where(chosen: Sequence[Message], rejected: Sequence[Message]) -> str:
    pairs = zip(_said(chosen[:-1]), _said(rejected[:-1]), strict=False)
    at = next((turn for turn, (one, other) in enumerate(pairs, start=1) if one != other), None)
    return f"at turn {at}" if at else f"{len(chosen)} turns and {len(rejected)}"


FORMAT = Format("preference", "chosen and rejected, with or without a prompt", _matches, _read)
