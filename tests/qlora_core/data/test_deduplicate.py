"""Exact de-duplication: who survives, and that nothing but spacing makes two rows one."""

import dataclasses
import random
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.deduplicate import drop_duplicates
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.split import Side

ORDER = {"first": 0, "second": 1, "third": 2}


def row(*turns: str, source: str = "first", line: int = 1, **fields: Any) -> Row:
    messages = [Message("assistant" if i % 2 else "user", text, train=bool(i % 2)) for i, text in enumerate(turns)]
    return make_row(Draft(messages, **fields), source, line)


def test_spacing_and_composition_make_no_difference_and_anything_else_does() -> None:
    rows = [
        row("What is é?", "A letter."),
        row(" What  is e\u0301?\n", "A\tletter.", line=2),
        row("What is é?", "A vowel.", line=3),
        row("what is é?", "A letter.", line=4),
        row("What is é? A letter.", "A letter.", line=5),
        row("What is é?", "A letter.", "What is é?", "A letter.", line=6),
    ]

    kept, dropped = drop_duplicates(rows, ORDER)

    assert len(kept) == 5
    (drop,) = dropped
    assert {drop.id, drop.matched_id} == {rows[0].id, rows[1].id}
    assert drop.matched_id == min(rows[0].id, rows[1].id)
    assert (drop.rule, drop.score) == ("duplicate", None)


def test_rejected_answer_is_part_of_a_pair() -> None:
    rows = [row("Q?", "A.", rejected=answer, line=line) for line, answer in enumerate([None, "B.", "C.", " B. "])]

    kept, dropped = drop_duplicates(rows, ORDER)

    assert len(kept) == 3
    (drop,) = dropped
    assert drop.line in (1, 3)


def test_equal_text_with_other_tools_is_no_duplicate() -> None:
    rows = [row("Q?", "A.", tools=tools, line=line) for line, tools in enumerate([None, '["a"]', '["b"]', '["a"]'])]

    kept, dropped = drop_duplicates(rows, ORDER)

    assert kept.tolist() == sorted([0, 1, 2], key=lambda place: rows[place].id)
    (drop,) = dropped
    assert (drop.id, drop.line) == (rows[1].id, 3)


def test_rows_of_an_earlier_set_survive_new_ones() -> None:
    spaced = [row("Q?", " " * count + "A.", source="first") for count in range(3)]
    lowest, _, highest = sorted(spaced, key=lambda one: one.id)
    old = dataclasses.replace(highest, source="third")
    other = row("Other?", "A.", source="second")
    rows = [lowest, old, other]

    assert drop_duplicates(rows, ORDER)[1][0].id == old.id
    kept, dropped = drop_duplicates(rows, ORDER, {"train": pa.array(["0" * 64]), "test": pa.array([old.id])})

    assert kept.tolist() == [1, 2]
    assert [(drop.id, drop.matched_id) for drop in dropped] == [(lowest.id, old.id)]


def test_two_rows_of_an_earlier_set_are_told_apart_as_usual() -> None:
    rows = [row("Q?", " A.", source="third"), row("Q?", "A.", source="second")]
    ids = pa.array([one.id for one in rows])
    earlier: dict[Side, pa.Array] = {"train": ids, "validation": pa.array([], pa.string())}

    assert drop_duplicates(rows, ORDER, earlier)[0].tolist() == [1]
    assert drop_duplicates([], ORDER, earlier)[0].tolist() == []


def test_turns_do_not_run_into_each_other() -> None:
    rows = [
        row("a", "b", "c", "d"),
        row("a assistant b", "c", "d", "e", line=2),
        row("a\x1fassistant\x1fb user c", "d", line=3),
        row("a assistant b user c", "d", line=4),
    ]

    kept, dropped = drop_duplicates(rows, ORDER)

    # The separator is white space to the key, so the last two are one row.
    assert len(kept) == 3
    assert {dropped[0].id, dropped[0].matched_id} == {rows[2].id, rows[3].id}


def test_survivor_is_of_the_earliest_source_then_of_the_first_category() -> None:
    rows = [
        row("Q?", "A.", source="third", line=1),
        row("Q?", "A.", source="second", line=5, category="b"),
        row("Q?", "A.", source="second", line=9, category="a"),
        row("Q?", "A.", source="second", line=7, category="a"),
    ]

    kept, dropped = drop_duplicates(rows, ORDER)

    assert kept.tolist() == [3]
    assert sorted((drop.source, drop.line) for drop in dropped) == [("second", 5), ("second", 9), ("third", 1)]


def test_no_rows() -> None:
    kept, dropped = drop_duplicates([], ORDER)

    assert (kept.tolist(), dropped) == ([], [])


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "a ", "b", "B", "é", "e\u0301"]),
        st.sampled_from(["x", " x", "y"]),
        st.sampled_from(sorted(ORDER)),
        st.sampled_from([None, "x", "z"]),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(drawn=ROWS, seed=st.integers(0, 9))
def test_as_a_slow_reference_has_it_whatever_the_order(drawn: list[tuple[str, str, str, Any]], seed: int) -> None:
    rows = [
        row(prompt, answer, source=source, line=line, category=category)
        for line, (prompt, answer, source, category) in enumerate(drawn)
    ]
    shuffled = random.Random(seed).sample(rows, len(rows))
    survivors: dict[Any, Row] = {}
    lost = []
    for one in sorted(rows, key=lambda row: (ORDER[row.source], row.id, row.category or "", row.line)):
        kept = survivors.setdefault(one.conversation_key, one)
        if kept is not one:
            lost.append((one.id, one.source, one.line, kept.id))

    for some in (rows, shuffled):
        positions, dropped = drop_duplicates(some, ORDER)

        assert [some[place] for place in positions] == list(survivors.values())
        assert [(drop.id, drop.source, drop.line, drop.matched_id) for drop in dropped] == lost
