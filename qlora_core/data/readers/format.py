"""What a dataset format is to the rest of curation, and the readings of single values that formats share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.data.row import Draft, Message, Role, RowError

Fields = Mapping[str, Any]

ROLE_ALIASES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


def as_it_is(fields: Fields) -> Sequence[Fields]:
    """A record that is one conversation."""
    return [fields]


@dataclass(frozen=True, slots=True)
class Format:
    """A dataset format. `matches` looks at fields and types only; `read` raises RowError for a row it cannot use.

    `parts` splits a record that nests several conversations; each part counts as a row.
    """

    name: str
    shape: str
    matches: Callable[[Fields], bool]
    read: Callable[[Fields], Draft]
    parts: Callable[[Fields], Sequence[Fields]] = as_it_is


def read_role(value: object, turn: int) -> Role:
    """The canonical role for any alias in `ROLE_ALIASES`, whatever its case. Raises RowError for another."""
    if not isinstance(value, str):
        raise RowError(f"wrong type: the role of turn {turn} is {_type_name(value)}, not a text")
    role = ROLE_ALIASES.get(value.strip().lower())
    if role is None:
        raise RowError(f"unknown role: {value!r} in turn {turn}; known: {', '.join(ROLE_ALIASES)}")
    return role


def read_text(value: object, field: str) -> str:
    """A text without the white space around it, which templates trim or not as they please. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"wrong type: {field} is {_type_name(value)}, not a text")
    return value.strip()


def read_optional_text(fields: Fields, *names: str) -> str:
    """The first of these fields that is there and not null, as by `read_text`; '' if none is."""
    for name in names:
        if fields.get(name) is not None:
            return read_text(fields[name], name)
    return ""


def first_present(fields: Fields, names: Sequence[str]) -> str | None:
    """The first of `names` that is a field of the record."""
    return next((name for name in names if name in fields), None)


def single_exchange(fields: Fields, prompt: str, answer: str) -> Draft:
    """The draft of one question and its answer, with the record's optional `system` text."""
    messages = [Message("user", prompt), Message("assistant", answer, train=True)]
    return make_draft(fields, messages)


def make_draft(fields: Fields, messages: Sequence[Message]) -> Draft:
    """A draft with what any format may say about a row: system text, category, licence, generator."""
    system = read_optional_text(fields, "system", "system_prompt")
    opening = [Message("system", system)] if system and not any(m.role == "system" for m in messages) else []
    return Draft(
        messages=[*opening, *messages],
        category=_label(fields, "category"),
        licence=_label(fields, "licence", "license"),
        generator=_label(fields, "generator", "model_name"),
    )


def _label(fields: Fields, *names: str) -> str | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def _type_name(value: object) -> str:
    names = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)
