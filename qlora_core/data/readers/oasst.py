"""Open Assistant trees: a prompt with ranked replies, each with its own. Which paths become rows is a setting.

Published counts for the same trees differ because nobody says which rule was used, so the rule and its counts are
shown. `best_path`: at each level the best reply, one conversation a tree. `best_replies`: the best reply to every
prompt and every follow-up to that; a path for every end. Paths that differ only in a last prompt nobody answered are
one, since that prompt is trimmed. The best reply is the one of lowest rank, unranked ones last, then in file order;
deleted ones are left out.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from qlora_core.data.readers.format import Fields, Format, make_draft, read_role, read_text
from qlora_core.data.row import Draft, Message, RowError

Rule = Literal["best_path", "best_replies"]
RULES: Mapping[Rule, str] = {
    "best_path": "best_path: one path a tree; at each level the reply of lowest rank, unranked ones last, then in "
    "file order",
    "best_replies": "best_replies: to each prompt the reply of lowest rank, unranked ones last, then in file order; to "
    "each reply all follow-ups; paths equal up to their last answer are one",
}
DEEPEST_TREE = 200
# Where `parts` leaves the path of a row, and how many more ended after the same answer.
PATH, ENDS = "path", "ends"


def oasst_format(rule: Rule) -> Format:
    """The format of trees, read by `rule`."""
    return Format(
        "oasst",
        "prompt: a tree of {role, text, replies}",
        _matches,
        _read,
        partial(_parts, rule),
        RULES[rule],
        partial(_count, rule),
    )


def _matches(fields: Fields) -> bool:
    root = fields.get("prompt")
    return isinstance(root, Mapping) and "text" in root and "role" in root


def _parts(rule: Rule, fields: Fields) -> Sequence[Fields]:
    shared = {name: value for name, value in fields.items() if name != "prompt"}
    rows: dict[int, dict[str, Any]] = {}
    for path in _paths(fields.get("prompt"), rule):
        row = rows.setdefault(id(_last_answered(path)), {**shared, PATH: path, ENDS: []})
        row[ENDS].append(_speaker(path[-1]))
    return list(rows.values())


def _last_answered(path: Sequence[object]) -> object:
    """The answer after which nothing but readable prompts come, which will be trimmed; else the end of the path."""
    for node in reversed(path):
        if _speaker(node) == "assistant":
            return node
        text = node.get("text") if isinstance(node, Mapping) and _speaker(node) == "user" else None
        if not isinstance(text, str) or not text.strip():
            break
    return path[-1]


def _paths(root: object, rule: Rule) -> list[list[object]]:
    """The paths from the root to an end, in file order; one that is too deep ends there and cannot be read."""
    ended: list[list[object]] = []
    waiting: list[list[object]] = [[root]]
    while waiting:
        path = waiting.pop()
        replies = _replies(path[-1]) if len(path) <= DEEPEST_TREE else []
        if replies and (rule == "best_path" or _speaker(path[-1]) != "assistant"):
            replies = [min(replies, key=_rank)]
        if not replies:
            ended.append(path)
        waiting += [[*path, reply] for reply in reversed(replies)]
    return ended


def _replies(node: object) -> list[object]:
    replies = node.get("replies") if isinstance(node, Mapping) else None
    if replies is not None and not isinstance(replies, list):
        return [replies]  # no message, and said to be none when the path is read
    return [reply for reply in replies or [] if not (isinstance(reply, Mapping) and reply.get("deleted") is True)]


def _rank(reply: object) -> float:
    rank = reply.get("rank") if isinstance(reply, Mapping) else None
    if isinstance(rank, int):
        return float(min(rank, 2**53))
    return rank if isinstance(rank, float) and not math.isnan(rank) else math.inf


def _speaker(node: object) -> str:
    try:
        return read_role(node.get("role"), 1) if isinstance(node, Mapping) else ""
    except RowError:
        return ""


def _read(fields: Fields) -> Draft:
    messages: list[Message] = []
    models: set[str] = set()
    path = fields[PATH]
    for turn, node in enumerate(path, start=1):
        if not isinstance(node, Mapping) or "text" not in node or "role" not in node or turn > DEEPEST_TREE:
            raise RowError(f"missing field: turn {turn} of the tree is no message with role and text")
        role = read_role(node["role"], turn)
        messages.append(Message(role, read_text(node["text"], f"the text of turn {turn}"), train=role == "assistant"))
        if role == "assistant" and isinstance(node.get("model_name"), str):
            models.add(node["model_name"])
    labels = {
        "generator": ", ".join(sorted(models)),
        "language": fields.get("language", fields.get("lang", path[0].get("lang"))),
        "group_keys": _tree_keys(fields),
    }
    return make_draft({**fields, **labels}, messages)


def _tree_keys(fields: Fields) -> list[Any]:
    declared = fields.get("group_keys") or []
    keys = declared if isinstance(declared, list) else [declared]
    tree = fields.get("message_tree_id")
    return [*keys, f"tree:{tree}"] if isinstance(tree, (str, int)) else keys


def _count(rule: Rule, parts: Sequence[Fields]) -> Mapping[str, int]:
    """Trees, their paths, how many of these end on the user, and what is left after trimming and removing repeats."""
    ends = [end for part in parts for end in part[ENDS]]
    return {"trees": 1, "paths": len(ends), "ending_on_user": ends.count("user"), "after_trimming": len(parts)}
