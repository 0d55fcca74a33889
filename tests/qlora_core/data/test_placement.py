"""Placement against a slow pairwise reference, and what added rows may do to old ones."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import SplitConfig
from qlora_core.data.placement import Placement, own_key, place_rows
from qlora_core.data.relations import user_turns
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.split import PRECEDENCE, SIDES, Side, side_of
from qlora_core.errors import DataError

EVEN = SplitConfig(validation=0.33, test=0.33, salt="even")


def conversation(*turns: str, group_keys: tuple[str, ...] = (), line: int = 1) -> Row:
    messages = [Message("assistant" if i % 2 else "user", text, train=bool(i % 2)) for i, text in enumerate(turns)]
    return make_row(Draft(messages, group_keys=group_keys), "rows.jsonl", line)


def place(
    rows: Sequence[Row],
    clusters: Mapping[str, int] | None = None,
    earlier: Mapping[Side, pa.Array] | None = None,
    config: SplitConfig = EVEN,
) -> Placement:
    cluster_of = np.array([(clusters or {}).get(row.id, -1) for row in rows], np.int64)
    return place_rows(rows, config, cluster_of, earlier)


def sides_by_id(rows: Sequence[Row], placement: Placement) -> dict[str, Side]:
    return {rows[position].id: side for side in SIDES for position in placement.sides[side].tolist()}


def prompt_on(side: Side, word: str, config: SplitConfig = EVEN) -> str:
    """A prompt with `word` in it whose hash lies on `side`."""
    return next(text for n in range(1000) if side_of(text := f"{word} {n}", config) == side)


def related(a: Row, b: Row, clusters: Mapping[str, int]) -> bool:
    mine, theirs = user_turns(a.messages), user_turns(b.messages)
    near = clusters.get(a.id, -1)
    return (
        mine[0] in theirs
        or theirs[0] in mine
        or bool(set(a.group_keys) & set(b.group_keys))
        or (near >= 0 and near == clusters.get(b.id, -1))
    )


def reference(rows: Sequence[Row], clusters: Mapping[str, int]) -> dict[str, Side]:
    """Every pair compared, side after side in the order of precedence."""
    kept: dict[str, Side] = {}
    by_id = {row.id: row for row in rows}
    for side in PRECEDENCE:
        mine = [row for row in rows if side_of(own_key(user_turns(row.messages), row.group_keys), EVEN) == side]
        held = [by_id[row_id] for row_id in kept]
        kept |= {row.id: side for row in mine if not any(related(row, other, clusters) for other in held)}
    return kept


TURN = st.sampled_from(["a", "A!", "b", "c", "d", "e", "f", "g", "h", "go on"])
ROW = st.builds(
    lambda turns, keys: conversation(*(part for turn in turns for part in (turn, "ok")), group_keys=tuple(keys)),
    st.lists(TURN, min_size=1, max_size=3),
    st.lists(st.sampled_from(["tree", "story", "set"]), max_size=2, unique=True),
)
ROWS = st.lists(ROW, max_size=14, unique_by=lambda row: row.id)
CLUSTER = st.integers(-4, 2)


@settings(deadline=None)
@given(rows=ROWS, data=st.data())
def test_equals_a_comparison_of_every_pair(rows: list[Row], data: st.DataObject) -> None:
    clusters = {row.id: data.draw(CLUSTER) for row in rows}

    placement = place(rows, clusters)

    found = sides_by_id(rows, placement)
    assert found == reference(rows, clusters)
    assert {drop.id for drop in placement.dropped} == {row.id for row in rows} - set(found)
    by_id = {row.id: row for row in rows}
    for drop in placement.dropped:
        assert drop.rule == "leak"
        assert drop.matched_id in found
        assert related(by_id[drop.id], by_id[drop.matched_id], clusters)


@settings(deadline=None)
@given(rows=ROWS, data=st.data())
def test_order_of_rows_does_not_matter(rows: list[Row], data: st.DataObject) -> None:
    clusters = {row.id: data.draw(CLUSTER) for row in rows}
    shuffled = data.draw(st.permutations(rows))

    one, other = place(rows, clusters), place(shuffled, clusters)

    assert sides_by_id(rows, one) == sides_by_id(shuffled, other)
    assert one.dropped == other.dropped
    assert (one.groups, one.largest_groups) == (other.groups, other.largest_groups)
    for side in SIDES:
        assert [rows[p].id for p in one.sides[side]] == sorted(shuffled[p].id for p in other.sides[side])


@settings(deadline=None)
@given(rows=ROWS, data=st.data())
def test_added_rows_move_nobody_and_take_nothing_from_test(rows: list[Row], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(rows)))
    clusters = {row.id: data.draw(CLUSTER) for row in rows}

    few, many = sides_by_id(rows, place(rows[:cut], clusters)), sides_by_id(rows, place(rows, clusters))

    assert all(many.get(row_id, side) == side for row_id, side in few.items())
    assert all(many.get(row_id) == "test" for row_id, side in few.items() if side == "test")


@settings(deadline=None)
@given(rows=ROWS, data=st.data(), salt=st.sampled_from(["even", "other"]))
def test_rows_of_an_earlier_set_all_stay_whatever_is_added(rows: list[Row], data: st.DataObject, salt: str) -> None:
    cut = data.draw(st.integers(0, len(rows)))
    before = place(rows[:cut], {row.id: data.draw(CLUSTER) for row in rows[:cut]})
    earlier: dict[Side, pa.Array] = {
        side: pa.array([rows[p].id for p in before.sides[side]], pa.string()) for side in SIDES
    }
    # Clusters of the larger set may chain old rows that were not in one cluster before.
    clusters = {row.id: data.draw(CLUSTER) for row in rows}

    after = place(rows, clusters, earlier, SplitConfig(validation=0.3, test=0.3, salt=salt))

    old, found = sides_by_id(rows[:cut], before), sides_by_id(rows, after)
    assert {row_id: found.get(row_id) for row_id in old} == old
    new = [row for row in rows if row.id in found and row.id not in old]
    for row in new:
        for other in (other for other in rows if other.id in found and found[other.id] != found[row.id]):
            assert not related(row, other, clusters)


def test_without_the_earlier_set_an_old_training_row_can_go_and_with_it_the_new_row_goes() -> None:
    held_prompt, old_prompt = prompt_on("test", "new"), prompt_on("train", "old")
    old = conversation(old_prompt, "ok", held_prompt, "ok")
    new = conversation(held_prompt, "ok")
    earlier: dict[Side, pa.Array] = {"train": pa.array([old.id])}

    assert sides_by_id([old], place([old])) == {old.id: "train"}
    assert sides_by_id([old, new], place([old, new])) == {new.id: "test"}
    placement = place([old, new], earlier=earlier)
    assert sides_by_id([old, new], placement) == {old.id: "train"}
    assert [(drop.id, drop.matched_id) for drop in placement.dropped] == [(new.id, old.id)]


def test_new_row_that_chains_two_old_ones_into_one_cluster_goes_and_they_stay() -> None:
    held, old = conversation(prompt_on("test", "held"), "ok"), conversation(prompt_on("train", "old"), "ok")
    earlier: dict[Side, pa.Array] = {"test": pa.array([held.id]), "train": pa.array([old.id])}
    for side in SIDES:
        new = conversation(prompt_on(side, "new"), "ok")
        rows = [held, old, new]

        placement = place(rows, {row.id: 7 for row in rows}, earlier)

        assert sides_by_id(rows, placement) == {held.id: "test", old.id: "train"}
        assert [drop.id for drop in placement.dropped] == [new.id]


def test_rows_of_a_declared_group_stay_together_and_none_is_lost() -> None:
    rows = [
        conversation(f"tell the story {n} in {language}", "...", group_keys=(f"story {n}",), line=n)
        for n in range(50)
        for language in ("en", "fr", "sw", "zu")
    ]

    placement = place(rows)

    assert not placement.dropped
    assert placement.groups == 50
    assert [(group.rows, group.dropped) for group in placement.largest_groups] == [(4, 0)] * 5
    sides_of_story: dict[tuple[str, ...], set[Side]] = {}
    for side in SIDES:
        for position in placement.sides[side]:
            sides_of_story.setdefault(rows[position].group_keys, set()).add(side)
    assert all(len(sides) == 1 for sides in sides_of_story.values())


def test_spellings_of_one_prompt_are_on_one_side() -> None:
    rows = [conversation(f"{text} {n}", str(n)) for n in range(40) for text in ("What is", "WHAT  is", "what, is?")]

    assert not place(rows).dropped


def test_what_is_related_to_a_dropped_row_alone_stays() -> None:
    test, bridge, train = prompt_on("test", "one"), prompt_on("train", "two"), prompt_on("train", "three")
    held = conversation(test, "ok")
    goes = conversation(bridge, "ok", test, "ok")
    stays = conversation(train, "ok", bridge, "ok")

    placement = place([held, goes, stays])

    assert sides_by_id([held, goes, stays], placement) == {held.id: "test", stays.id: "train"}
    assert placement.groups == 1
    [group] = placement.largest_groups
    assert (group.rows, group.dropped, group.first_id) == (3, 1, min(held.id, goes.id, stays.id))


def test_later_turns_alone_are_no_relation() -> None:
    rows = [conversation(prompt_on(side, "topic"), "ok", "go on", "ok") for side in SIDES]

    placement = place(rows)

    assert not placement.dropped
    assert placement.groups == 3
    assert placement.largest_groups == ()


def test_no_rows_are_three_empty_sides() -> None:
    placement = place([])

    assert [placement.sides[side].tolist() for side in SIDES] == [[], [], []]
    assert (placement.dropped, placement.groups, placement.largest_groups) == ([], 0, ())


def test_faults_of_the_caller_are_named() -> None:
    row = conversation("a", "b")
    with pytest.raises(DataError, match=f"id of another row.*{row.id}"):
        place([row, row])
    with pytest.raises(DataError, match=r"cluster_of has shape \(2,\) for 1 rows"):
        place_rows([row], EVEN, np.array([1, 2]))


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 200))
def test_group_count_is_that_of_the_prompts(count: int) -> None:
    rows = [conversation(f"prompt {n % 7}", f"answer {n}") for n in range(count)]

    assert place(rows).groups == min(count, 7)
