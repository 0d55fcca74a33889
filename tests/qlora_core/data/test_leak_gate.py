"""Leaks planted in written files: the gate finds each kind, and nothing in what the placement made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import NearDuplicatesConfig, SplitConfig
from qlora_core.data.leak_gate import check_no_leaks
from qlora_core.data.near_duplicates.find import drop_near_duplicates
from qlora_core.data.placement import place_rows, read_earlier
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.shards import shard_name
from qlora_core.data.split import SIDES, Side
from qlora_core.errors import DataError

EVEN = SplitConfig(validation=0.33, test=0.33, salt="even")
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        "train": pa.list_(pa.bool_()),
        "group_keys": pa.list_(pa.string()),
        "rejected": pa.string(),
    }
)


def conversation(*turns: str, group_keys: tuple[str, ...] = ()) -> Row:
    messages = [Message("assistant" if i % 2 else "user", text, train=bool(i % 2)) for i, text in enumerate(turns)]
    return make_row(Draft(messages, group_keys=group_keys), "rows.jsonl", 1)


def write(folder: Path, splits: Mapping[Side, Sequence[Row]]) -> Path:
    """The columns the gate looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        rows = [
            {
                "id": row.id,
                "messages": [{"role": m.role, "content": m.content} for m in row.messages],
                "train": [m.train for m in row.messages],
                "group_keys": list(row.group_keys),
                "rejected": row.rejected,
            }
            for row in splits.get(side, ())
        ]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / shard_name(side, 0, 1))
    return folder


def same_answer(rows: Sequence[Row]) -> np.ndarray:
    """Rows that end alike are one cluster; an answer that no other row has is none."""
    answers = [row.messages[-1].content for row in rows]
    return np.array([answers.index(text) if answers.count(text) > 1 else -1 for text in answers])


HELD = conversation("What is alpha?", "A letter.", "And beta?", "The next.", group_keys=("tree 1",))
CLEAN: dict[Side, list[Row]] = {
    "test": [HELD],
    "validation": [conversation("What is iota?", "Small.")],
    "train": [conversation("What is gamma?", "The third.", "And beta?", "The second."), conversation("Hi.", "Hello.")],
}
LEAKS = {
    "the same conversation": conversation("what is ALPHA", "a letter", "and beta", "the next"),
    "a prompt is a user turn of the other": conversation("Hello.", "Hi.", "what is alpha", "It is a letter."),
    "a prompt is a user turn of": conversation("And beta", "The second letter."),
    "the same declared group": conversation("What is delta?", "The fourth.", group_keys=("tree 0", "tree 1")),
}


def test_clean_set_passes_with_and_without_a_look_for_near_duplicates(tmp_path: Path) -> None:
    write(tmp_path, CLEAN)

    check_no_leaks(tmp_path)
    check_no_leaks(tmp_path, same_answer)


@pytest.mark.parametrize("reason", LEAKS)
@pytest.mark.parametrize("side", ["train", "validation"])
def test_planted_leak_is_found_named_and_explained(reason: str, side: Side, tmp_path: Path) -> None:
    leak = LEAKS[reason]
    write(tmp_path, {**CLEAN, side: [*CLEAN[side], leak]})

    with pytest.raises(DataError) as caught:
        check_no_leaks(tmp_path)

    assert f"{leak.id} ({side}) matches {HELD.id} (test): {reason}" in str(caught.value)


def test_near_duplicates_on_two_sides_are_found_by_the_search_it_is_given(tmp_path: Path) -> None:
    copy = conversation("Which letter comes after alpha?", "The next.")
    write(tmp_path, {**CLEAN, "train": [*CLEAN["train"], copy]})

    check_no_leaks(tmp_path)
    with pytest.raises(DataError, match=rf"{copy.id} \(train\) matches {HELD.id} \(test\): near-duplicates"):
        check_no_leaks(tmp_path, same_answer)


def test_row_leaks_between_validation_and_train(tmp_path: Path) -> None:
    copy = conversation("what is iota", "Tiny.")
    write(tmp_path, {**CLEAN, "train": [*CLEAN["train"], copy]})

    with pytest.raises(DataError, match=rf"leak, 1 rows.*{copy.id} \(train\) matches .* \(validation\)"):
        check_no_leaks(tmp_path)


def test_id_that_occurs_twice_on_one_side_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {**CLEAN, "test": [HELD, HELD]})

    with pytest.raises(DataError, match=rf"1 ids occur twice: {HELD.id} occurs twice"):
        check_no_leaks(tmp_path)


def test_row_without_a_user_turn_is_refused(tmp_path: Path) -> None:
    broken = Row("broken", (Message("assistant", "Hello."),), "rows.jsonl", 1)
    write(tmp_path, {**CLEAN, "train": [broken]})

    with pytest.raises(DataError, match="row broken has no user turn"):
        check_no_leaks(tmp_path)


def test_search_for_near_duplicates_sees_every_written_row_with_its_side(tmp_path: Path) -> None:
    seen: list[Row] = []

    def none_alike(rows: Sequence[Row]) -> np.ndarray:
        seen.extend(rows)
        return np.full(len(rows), -1)

    check_no_leaks(write(tmp_path, CLEAN), none_alike)

    assert [(row.id, row.source, row.messages) for row in seen] == [
        (row.id, side, row.messages) for side in SIDES for row in CLEAN[side]
    ]
    assert seen[-1].group_keys == ("tree 1",)


def test_real_search_finds_a_near_copy_and_spares_the_rest(tmp_path: Path) -> None:
    story = " ".join(f"word{n}" for n in range(60))
    held, copy = conversation("Tell me a story.", story), conversation("Tell a long story.", f"{story} and more")
    other = conversation("Tell no story.", " ".join(f"other{n}" for n in range(60)))

    def search(rows: Sequence[Row]) -> np.ndarray:
        return drop_near_duplicates(rows, {"test": 0, "validation": 1, "train": 2}, NearDuplicatesConfig()).cluster_of

    check_no_leaks(write(tmp_path, {"test": [held], "train": [other]}), search)
    with pytest.raises(DataError, match=rf"{copy.id} \(train\) matches {held.id} \(test\): near-duplicates"):
        check_no_leaks(write(tmp_path, {"test": [held], "train": [copy, other]}), search)


TURN = st.sampled_from(["a", "A!", "b", "c", "d", "e", "go on"])
ROW = st.builds(
    lambda turns, keys: conversation(*(part for turn in turns for part in (turn, "ok")), group_keys=tuple(keys)),
    st.lists(TURN, min_size=1, max_size=3),
    st.lists(st.sampled_from(["tree", "story", "set"]), max_size=1),
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=14, unique_by=lambda row: row.id))
def test_what_is_placed_passes_and_a_dropped_row_put_back_does_not(
    rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("placed")
    placement = place_rows(rows, EVEN, np.full(len(rows), -1))
    splits: dict[Side, list[Row]] = {side: [rows[p] for p in placement.sides[side].tolist()] for side in SIDES}

    check_no_leaks(write(folder, splits))

    ids = read_earlier(folder)
    assert {side: ids[side].to_pylist() for side in SIDES} == {side: [r.id for r in splits[side]] for side in SIDES}
    for drop in placement.dropped:
        back = next(row for row in rows if row.id == drop.id)
        own: Side = next(side for side in SIDES if drop.matched_id not in {row.id for row in splits[side]})
        with pytest.raises(DataError, match="leak"):
            check_no_leaks(write(folder, {**splits, own: [*splits[own], back]}))
