"""Open Assistant trees: a prompt with ranked replies, each with its own. A tree gives its single best path."""

from collections.abc import Mapping
from typing import Any

from qlora_core.data.readers.format import Fields, Format, make_draft, read_role, read_text
from qlora_core.data.row import Draft, Message, RowError

# Shown in logs and on the card: published counts for these trees differ because nobody says which rule was used.
PATH_RULE = "single best path: at each level the reply of lowest rank, unranked ones last, then in file order"
DEEPEST_TREE = 200


def _matches(fields: Fields) -> bool:
    root = fields.get("prompt")
    return isinstance(root, Mapping) and "text" in root and "role" in root


def _read(fields: Fields) -> Draft:
    node: Any = fields.get("prompt")
    messages: list[Message] = []
    models: set[str] = set()
    while node is not None:
        turn = len(messages) + 1
        if not isinstance(node, Mapping) or "text" not in node or "role" not in node or turn > DEEPEST_TREE:
            raise RowError(f"missing field: turn {turn} of the tree is no message with role and text")
        role = read_role(node["role"], turn)
        messages.append(Message(role, read_text(node["text"], f"the text of turn {turn}"), train=role == "assistant"))
        if role == "assistant" and isinstance(node.get("model_name"), str):
            models.add(node["model_name"])
        node = _best_reply(node, turn)
    return make_draft({**fields, "generator": ", ".join(sorted(models))}, messages)


def _best_reply(node: Fields, turn: int) -> object:
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise RowError(f"wrong type: the replies to turn {turn} are no list")
    usable = [reply for reply in replies if not (isinstance(reply, Mapping) and reply.get("deleted") is True)]
    return min(usable, key=_rank, default=None)


def _rank(reply: object) -> float:
    rank = reply.get("rank") if isinstance(reply, Mapping) else None
    return float(rank) if isinstance(rank, (int, float)) else float("inf")


FORMAT = Format("oasst", "prompt: a tree of {role, text, replies}", _matches, _read)
