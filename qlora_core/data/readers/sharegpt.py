"""ShareGPT conversations: a list of turns with `from` and `value`, and weights per turn as in `messages`."""

from collections.abc import Mapping

from qlora_core.data.readers.format import Fields, Format, make_draft, read_role, read_text
from qlora_core.data.readers.messages import is_trained, turn_list
from qlora_core.data.row import Draft, Message, RowError


def _matches(fields: Fields) -> bool:
    return turn_list(fields, "from") is not None


def _read(fields: Fields) -> Draft:
    found = turn_list(fields, "from")
    if found is None:
        raise RowError(f"missing field: a list of turns with from and value under conversations; got {sorted(fields)}")
    messages = []
    for number, turn in enumerate(found[1], start=1):
        if not isinstance(turn, Mapping) or "from" not in turn:
            raise RowError(f"missing field: turn {number} does not say whom it is from")
        role = read_role(turn["from"], number)
        content = read_text(turn.get("value"), f"the value of turn {number}")
        messages.append(Message(role, content, is_trained(turn, number, default=role == "assistant")))
    return make_draft(fields, messages)


FORMAT = Format("sharegpt", "conversations: a list of {from, value}", _matches, _read)
