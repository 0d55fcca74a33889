"""Conversation trees: which paths become rows under each rule, and that the counts of the rule are told."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import ReadersConfig
from qlora_core.data.readers.oasst import oasst_format
from qlora_core.data.reading import SourceReading, read_source
from qlora_core.data.source_files import SourceFile

Rule = Literal["best_path", "best_replies"]


def node(role: str, text: str, *replies: object, **fields: object) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **fields}


def user(text: str, *replies: object, **fields: object) -> dict[str, Any]:
    return node("prompter", text, *replies, **fields)


def answer(text: str, *replies: object, **fields: object) -> dict[str, Any]:
    return node("assistant", text, *replies, **fields)


def read(folder: Path, rule: Rule, *trees: object) -> SourceReading:
    path = folder / "trees"
    lines = [json.dumps({"message_tree_id": f"t{number}", "prompt": tree}) for number, tree in enumerate(trees)]
    path.write_text("\n".join(lines))
    return read_source(SourceFile("trees", path), ReadersConfig(oasst=rule))


def said(reading: SourceReading) -> list[list[str]]:
    return [[message.content for message in row.messages] for row in reading.rows]


TREE = user(
    "root",
    answer("worse", rank=1),
    answer(
        "best",
        user("first", answer("one")),
        user("second", answer("two", user("unheard")), answer("gone", rank=-1, deleted=True)),
        user("unanswered"),
        user("also unanswered"),
        rank=0,
        model_name="m",
    ),
    lang="de",
)


def test_best_path_is_one_row_a_tree(tmp_path: Path) -> None:
    reading = read(tmp_path, "best_path", TREE)

    assert said(reading) == [["root", "best", "first", "one"]]
    assert reading.rule_counts == {"trees": 1, "paths": 1, "ending_on_user": 0, "after_trimming": 1}


def test_best_replies_follow_every_follow_up_once(tmp_path: Path) -> None:
    reading = read(tmp_path, "best_replies", TREE)

    assert said(reading) == [
        ["root", "best", "first", "one"],
        ["root", "best", "second", "two"],
        ["root", "best"],
    ]
    assert reading.rule_counts == {"trees": 1, "paths": 4, "ending_on_user": 3, "after_trimming": 3}
    assert (reading.rows_in, reading.trimmed) == (3, 2)
    assert reading.rule is not None and reading.rule.startswith("best_replies")


@pytest.mark.parametrize("rule", ["best_path", "best_replies"])
def test_tree_model_and_language_are_kept(tmp_path: Path, rule: Rule) -> None:
    row = read(tmp_path, rule, user("other", answer("a")), TREE).rows[1]

    assert (row.group_keys, row.generator, row.language) == (("tree:t1",), "m", "de")


def test_one_bad_branch_costs_only_its_own_paths(tmp_path: Path) -> None:
    tree = user("root", answer("best", node("wizard", "x"), user("y"), user("z", answer(""))))

    reading = read(tmp_path, "best_replies", tree)

    assert said(reading) == [["root", "best"]]
    assert [entry.kind for entry in reading.quarantined] == ["empty answer", "unknown role"]


def test_tree_too_deep_and_replies_of_a_wrong_type_are_set_aside(tmp_path: Path) -> None:
    deep = user("end")
    for turn in range(220):
        deep = answer("a", deep) if turn % 2 == 0 else user("u", deep)
    odd = {"role": "prompter", "text": "a", "replies": 5}

    reading = read(tmp_path, "best_path", deep, odd, user("a"), user("b", answer("c")))

    assert said(reading) == [["b", "c"]]
    assert [entry.line for entry in reading.quarantined] == [1, 2, 3]


NODES = st.recursive(
    st.builds(user, st.just("u")) | st.builds(answer, st.just("a")),
    lambda inner: st.builds(
        lambda role, rank, replies: node(role, role, *replies, rank=rank),
        st.sampled_from(["prompter", "assistant"]),
        st.none() | st.integers(0, 2) | st.floats(),
        st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)


def slow_paths(tree: dict[str, Any]) -> list[list[int]]:
    """All paths of `best_replies`, by recursion over the definition."""
    replies = tree["replies"]
    if replies and tree["role"] == "prompter":
        ranks = [reply.get("rank") for reply in replies]
        keys = [float("inf") if rank is None or rank != rank else rank for rank in ranks]
        replies = [replies[keys.index(min(keys))]]
    return [[id(tree), *path] for reply in replies for path in slow_paths(reply)] if replies else [[id(tree)]]


@settings(deadline=None, max_examples=100)
@given(tree=NODES)
def test_best_replies_equal_the_definition(tree: dict[str, Any]) -> None:
    form = oasst_format("best_replies")

    parts = form.parts({"prompt": tree})

    expected = slow_paths(tree)
    assert form.count(parts)["paths"] == len(expected)
    assert all([id(each) for each in part["path"]] in expected for part in parts)
