"""What a dataset format is to the rest of curation, and the readings of single values that formats share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.data.containers.json_value import parse_json
from qlora_core.data.containers.record import quoted
from qlora_core.data.row import Draft, Message, Role, RowError
from qlora_core.digest import canonical_json

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
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
}


def as_it_is(fields: Fields) -> Sequence[Fields]:
    """A record that is one conversation."""
    return [fields]


@dataclass(frozen=True, slots=True)
class Format:
    """A dataset format. `matches` looks at fields and types only; `read` raises RowError for a row it cannot use.

    `parts` splits a record that nests several conversations; each part counts as a row. Where that takes a choice,
    `rule` says which, and `count` gives what one record adds to the counts that are shown beside the rule.
    """

    name: str
    shape: str
    matches: Callable[[Fields], bool]
    read: Callable[[Fields], Draft]
    parts: Callable[[Fields], Sequence[Fields]] = as_it_is
    rule: str | None = None
    count: Callable[[Sequence[Fields]], Mapping[str, int]] = lambda parts: {}


def read_role(value: object, turn: int) -> Role:
    """The canonical role for any alias in `ROLE_ALIASES`, whatever its case. Raises RowError for another."""
    if not isinstance(value, str):
        raise RowError(f"wrong type: the role of turn {turn} is {type_name(value)}, not a text")
    role = ROLE_ALIASES.get(value.strip().lower())
    if role is None:
        raise RowError(f"unknown role: {quoted(value)} in turn {turn}; known: {', '.join(ROLE_ALIASES)}")
    return role


def read_text(value: object, field: str) -> str:
    """A text without the white space around it, which templates trim or not as they please. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"wrong type: {field} is {type_name(value)}, not a text")
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


def make_draft(fields: Fields, messages: Sequence[Message], rejected: str | None = None) -> Draft:
    """A draft with what any format may say about a row.

    That is: system text, category, licence, generator, language, tools, and keys of what must not be split up. Raises
    RowError for one of them that is no text; numbers and booleans count as text.
    """
    system = read_optional_text(fields, "system", "system_prompt")
    opening = [Message("system", system)] if system and not any(m.role == "system" for m in messages) else []
    return Draft(
        messages=[*opening, *messages],
        category=_label(fields, "category"),
        licence=_label(fields, "licence", "license"),
        generator=_label(fields, "generator", "model_name", "model"),
        language=_label(fields, "language", "lang"),
        tools=read_tools(fields.get("tools", fields.get("functions"))),
        rejected=rejected,
        group_keys=_read_group_keys(fields),
    )


def read_tools(value: object) -> str | None:
    """The canonical JSON of a list of tools, given as such or as JSON text; None for none. Raises RowError."""
    if isinstance(value, str) and value.strip():
        value = parse_json(value)
    if not value:
        return None
    if not isinstance(value, (list, dict)):
        raise RowError(f"wrong type: tools are {type_name(value)}, not a list")
    try:
        return canonical_json(value).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"wrong type: tools have no JSON form: {error}") from error


def _read_group_keys(fields: Fields) -> tuple[str, ...]:
    declared = fields.get("group_keys", fields.get("group_key"))
    keys = declared if isinstance(declared, list) else [declared]
    return tuple(dict.fromkeys(text for key in keys if (text := _as_label(key, "group_keys"))))


def _label(fields: Fields, *names: str) -> str | None:
    return next((text for name in names if (text := _as_label(fields.get(name), name))), None)


def _as_label(value: object, name: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, bool, int, float)):
        raise RowError(f"wrong type: {name} is {type_name(value)}, not a text")
    return str(value).strip() or None


def type_name(value: object) -> str:
    """What a value is called in a message."""
    names = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)
