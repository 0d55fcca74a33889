"""OpenAI-style conversations: turns with `role` and `content`, content as text or as parts, weights per turn."""

from collections.abc import Mapping, Sequence

from qlora_core.data.readers.format import Fields, Format, make_draft, read_role, read_text
from qlora_core.data.row import Draft, Message, RowError

LIST_FIELDS = ("messages", "conversations", "conversation")
WEIGHT_FIELDS = ("loss_weight", "weight", "train")


def turn_list(fields: Fields, key: str) -> tuple[str, Sequence[object]] | None:
    """The first field that lists turns whose opening turn says who speaks under `key`; None if there is none."""
    for name in LIST_FIELDS:
        turns = fields.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and key in turns[0]:
            return name, turns
    return None


def read_turns(turns: Sequence[object]) -> list[Message]:
    """The messages of a list of `{role, content}` objects.

    An assistant turn is trained unless its weight says 0. Raises RowError for an unknown role, a part that is no text,
    tool calls, and a weight other than 0 and 1.
    """
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RowError(f"wrong type: turn {number} is no object")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise RowError(f"tool call: turn {number}; only text turns can be trained on")
        if "role" not in turn:
            raise RowError(f"missing field: turn {number} has no role; it has {sorted(map(str, turn))}")
        role = read_role(turn["role"], number)
        content = _read_content(turn.get("content"), number)
        messages.append(Message(role, content, is_trained(turn, number, default=role == "assistant")))
    return messages


def _read_content(content: object, turn: int) -> str:
    if not isinstance(content, list):
        return read_text(content, f"the content of turn {turn}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise RowError(f"unusable part: turn {turn} holds a part of type {kind!r}; only text can be trained on")
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise RowError(f"wrong type: a text part of turn {turn} holds no text")
        texts.append(text)
    return "".join(texts).strip()


def is_trained(turn: Fields, number: int, *, default: bool) -> bool:
    """Whether a turn's weight asks for loss; `default` where it has none. Raises RowError for any but 0 and 1."""
    for name in WEIGHT_FIELDS:
        weight = turn.get(name)
        if weight is None:
            continue
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            raise RowError(f"wrong weight: {name} of turn {number} is {weight!r}; allowed are 0 and 1")
        return bool(weight)
    return default


def _matches(fields: Fields) -> bool:
    return turn_list(fields, "role") is not None


def _read(fields: Fields) -> Draft:
    found = turn_list(fields, "role")
    if found is None:
        raise RowError(f"missing field: a list of turns with role and content under messages; got {sorted(fields)}")
    return make_draft(fields, read_turns(found[1]))


FORMAT = Format("messages", "messages: a list of {role, content}", _matches, _read)
