"""Near-duplicate removal through its door, beside a slow reference in plain Python."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import NearDuplicatesConfig
from qlora_core.data.near_duplicates.find import NearDuplicates, drop_near_duplicates
from qlora_core.data.near_duplicates.scan import text_of
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.row_store import RowStore
from qlora_core.data.text_form import folded
from qlora_core.data.wrappers import find_preambles

ORDER = {"first": 0, "second": 1}
WORDS = [f"word{number}" for number in range(2000)]


def row(prompt: str, answer: str, source: str = "first", line: int = 1, system: str = "", rejected: Any = None) -> Row:
    turns = [Message("system", system)] if system else []
    turns += [Message("user", prompt), Message("assistant", answer, train=True)]
    return make_row(Draft(turns, rejected=rejected), source, line)


def text(seed: int, words: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def edited(words: Sequence[str], places: Sequence[int], mark: str = "edit") -> str:
    return " ".join(f"{mark}{place}" if place in places else word for place, word in enumerate(words))


def find(rows: Sequence[Row], **settings: Any) -> NearDuplicates:
    return drop_near_duplicates(rows, ORDER, NearDuplicatesConfig(**settings))


def reference_set(compared: str, width: int = 5) -> set[tuple[str, ...]]:
    words = folded(compared).split()
    return {tuple(words[k : k + width]) for k in range(max(1, len(words) - width + 1))}


def reference_jaccard(first: str, second: str) -> float:
    a, b = reference_set(first), reference_set(second)
    return len(a & b) / len(a | b)


def check_invariants(rows: Sequence[Row], found: NearDuplicates, threshold: float) -> None:
    """What holds for `keep_one`, whatever the rows."""
    preambles = find_preambles(rows)
    texts = {row.id: text_of(row, preambles) for row in rows}
    kept = {rows[place].id for place in found.kept}
    assert len(found.kept) + len(found.dropped) == len(rows)
    for drop in found.dropped:
        assert drop.rule == "near_duplicate"
        assert drop.matched_id in kept
        similarity = reference_jaccard(texts[drop.id], texts[drop.matched_id or ""])
        assert drop.score == pytest.approx(similarity, abs=1e-12)
        assert similarity >= threshold
    survivors = {int(found.cluster_of[place]) for place in found.kept}
    assert set(found.cluster_of.tolist()) - {-1} <= survivors
    members = np.bincount(found.cluster_of[found.cluster_of >= 0], minlength=found.clusters)
    assert len(members) == found.clusters
    assert (members >= 2).all()


def test_an_edited_copy_goes_and_names_the_row_of_the_earlier_source() -> None:
    words = text(1)
    original = row("Say it.", " ".join(words), "second")
    copy = row("Say it.", edited(words, [30]), "first")
    other = row("Say it.", " ".join(text(2)), "first", 2)

    found = find([original, copy, other])

    assert set(found.kept.tolist()) == {1, 2}
    (drop,) = found.dropped
    assert (drop.id, drop.matched_id, drop.source, drop.line) == (original.id, copy.id, "second", 1)
    # 62 words make 58 shingles; one other word takes 5 of them: 53 shared of 63.
    assert drop.score == pytest.approx(53 / 63)
    assert found.cluster_of.tolist() == [0, 0, -1]
    assert found.largest[0] == {"size": 2, "id": copy.id, "source": "first", "members": [original.id]}


def test_a_chain_does_not_make_its_ends_copies() -> None:
    words = text(3, 100)
    links = [row("Go.", edited(words, list(range(0, 20 * k, 20))[:k]), line=k) for k in range(6)]
    similar = [[reference_jaccard(a.messages[1].content, b.messages[1].content) for b in links] for a in links]
    assert similar[0][1] >= 0.8 > similar[0][5], "the ends of the chain must differ, its neighbours not"

    found = find(links)

    assert len(set(found.cluster_of.tolist())) == 1
    assert 1 < len(found.kept) < 6
    check_invariants(links, found, 0.8)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("Name a colour.", "Name a fruit."),
        ("Yes?", "No?"),
        ("日本語の文", "日本語の句"),
    ],
)
def test_short_rows_are_copies_only_if_they_are_equal(first: str, second: str) -> None:
    assert len(find([row(first, "Ok"), row(second, "Ok", line=2)]).kept) == 2
    assert len(find([row(first, "Ok"), row(f" {first.upper()} ", "OK.", line=2)]).kept) == 1


def test_wrappers_system_prompts_and_rejected_answers() -> None:
    answer = " ".join(text(4))
    wrapped = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is kangen water?\n\n### Response:\n"
    )
    bare = row("What is kangen water?", "It is water.")
    dressed = row(wrapped, "It is water.", "second", system="You are a helpful assistant.")
    document = row("Summarise.", answer, system=" ".join(text(5, 200)))
    other_document = row("Summarise.", answer, system=" ".join(text(6, 200)), line=2)
    pair, other_pair = (row("Which?", answer, rejected=" ".join(text(n, 70))) for n in (7, 8))

    found = find([bare, dressed, document, other_document, pair, other_pair])

    assert [(drop.id, drop.matched_id, drop.score) for drop in found.dropped] == [(dressed.id, bare.id, 1.0)]


def test_rows_of_other_tools_never_match_and_of_the_same_tools_match_by_what_they_say() -> None:
    words = text(14)
    many, few = (json.dumps(text(15, count)) for count in (300, 299))
    original, copy = row("Say it.", " ".join(words)), row("Say it.", edited(words, [30]))
    other = row("Say it.", " ".join(text(16)))
    rows = [
        make_row(Draft(one.messages, tools=tools), "first", line)
        for line, (one, tools) in enumerate([(original, many), (copy, many), (other, many), (original, few)], 1)
    ]

    found = find([*rows, original])

    (drop,) = found.dropped
    assert {drop.id, drop.matched_id} == {rows[0].id, rows[1].id}
    assert drop.score == pytest.approx(53 / 63)


def test_rows_of_an_earlier_set_survive_new_ones() -> None:
    words = text(17)
    alike = [row("Go.", edited(words, [place])) for place in (10, 30, 50)]
    lowest, _, highest = sorted(alike, key=lambda one: one.id)
    old = dataclasses.replace(highest, source="second")
    rows, config = [lowest, old], NearDuplicatesConfig(threshold=0.6)

    assert drop_near_duplicates(rows, ORDER, config).kept.tolist() == [0]
    found = drop_near_duplicates(rows, ORDER, config, earlier={"validation": pa.array([old.id])})

    assert found.kept.tolist() == [1]
    assert [(drop.id, drop.matched_id) for drop in found.dropped] == [(lowest.id, old.id)]


def preamble_rows(count: int = 40) -> list[Row]:
    preamble = "tools: enabled\nsearch: " + " ".join(text(9, 120)) + "\nsearch(query)\n"
    return [row(preamble + " ".join(text(100 + n, 12)), " ".join(text(300 + n, 6)), line=n) for n in range(count)]


def test_rows_that_share_only_a_preamble_stay() -> None:
    rows = preamble_rows()
    assert reference_jaccard(*("\n".join(m.content for m in r.messages) for r in rows[:2])) > 0.7

    found = find(rows, threshold=0.7)

    assert len(found.kept) == len(rows)
    assert (found.preambles.count, found.preambles.rows) == (1, len(rows))


def test_actions() -> None:
    words = text(10)
    rows = [row("Go.", edited(words, [place]), line=place) for place in (10, 50)]
    rows += [row("Go.", f" {rows[0].messages[1].content}", line=3), row("Stay.", " ".join(text(11)), line=4)]
    best = min((rows[place] for place in range(3)), key=lambda row: row.id)

    kept = {action: find(rows, action=action, threshold=0.6) for action in ("keep_one", "drop_all", "report", "none")}

    assert {action: len(found.kept) for action, found in kept.items()} == {
        "keep_one": 2,
        "drop_all": 1,
        "report": 4,
        "none": 4,
    }
    assert {drop.matched_id for drop in kept["keep_one"].dropped} == {best.id}
    assert all(drop.score >= 0.6 and drop.matched_id != drop.id for drop in kept["drop_all"].dropped if drop.score)
    assert kept["report"].clusters == kept["keep_one"].clusters == 1
    assert kept["report"].dropped == []
    assert kept["none"].cluster_of.tolist() == [-1] * 4


def test_rows_behind_arrow_give_the_same_result() -> None:
    rows = [*preamble_rows(), *(row("Go.", edited(text(13), [n, n + 20]), "second", n) for n in range(20))]
    store = RowStore(rows)

    listed, stored, viewed = (find(some, threshold=0.6) for some in (rows, store, store.select(np.arange(len(rows)))))

    assert 0 < len(listed.dropped) < 20
    assert listed.dropped == stored.dropped == viewed.dropped
    assert listed.summary() == stored.summary() == viewed.summary()


def test_no_rows_and_one_row() -> None:
    assert find([]).kept.tolist() == []
    assert find([row("a", "b")]).kept.tolist() == [0]
    assert find([]).false_share == 0.0


def test_a_crowd_of_like_rows_is_compared_with_representatives() -> None:
    words = text(12, 120)
    crowd = [row("Go.", edited(words, [n % 120], f"edit{n}x"), line=n) for n in range(600)]

    found = find(crowd)

    check_invariants(crowd, found, 0.8)
    assert found.candidates < 600 * 599 / 4
    assert found.capped[0]["size"] > 64
    assert found.capped[0]["unmatched"] == 0
    assert len(found.kept) == 1
    assert found.largest[0]["size"] == 600


def test_many_copies_of_the_same_words_stay_cheap() -> None:
    rows = [row("Go.", "\n" * (n + 1) + "The  same, always the same old answer!" + " " * n, line=n) for n in range(500)]

    found = find(rows)

    assert (len(found.kept), found.candidates, found.verified) == (1, 499, 499)
    assert {drop.score for drop in found.dropped} == {1.0}


EDITS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 39), max_size=6), st.sampled_from(["first", "second"])),
    min_size=1,
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=EDITS, threshold=st.sampled_from([0.5, 0.8, 1.0]), seed=st.integers(0, 3))
def test_each_dropped_row_matches_its_survivor_whatever_the_order(
    edits: list[tuple[int, list[int], str]], threshold: float, seed: int
) -> None:
    rows = [
        row("Go.", edited(text(base, 40), places), source, line) for line, (base, places, source) in enumerate(edits)
    ]
    rows = list({(row.id, row.source): row for row in rows}.values())
    rows = list({row.id: row for row in rows}.values())
    shuffled = random.Random(seed).sample(rows, len(rows))

    found, again = (find(some, threshold=threshold) for some in (rows, shuffled))

    check_invariants(rows, found, threshold)
    assert [rows[place].id for place in found.kept] == [shuffled[place].id for place in again.kept]
    assert found.dropped == again.dropped
    assert found.summary() == again.summary()
    clusters = {row.id: int(cluster) for row, cluster in zip(rows, found.cluster_of, strict=True)}
    assert clusters == {row.id: int(cluster) for row, cluster in zip(shuffled, again.cluster_of, strict=True)}


def slow_survivors(rows: Sequence[Row], threshold: float) -> set[str]:
    """Every pair compared, the best first: what the fast way may miss a pair of, never add one to."""
    preambles = find_preambles(rows)
    kept: list[Row] = []
    for one in sorted(rows, key=lambda row: (ORDER[row.source], row.id)):
        mine = text_of(one, preambles)
        if not any(reference_jaccard(mine, text_of(other, preambles)) >= threshold for other in kept):
            kept.append(one)
    return {row.id for row in kept}


def test_survivors_are_those_of_comparing_every_pair() -> None:
    draw = random.Random(5)
    rows = []
    for number in range(150):
        places = draw.sample(range(50), draw.choice([0, 1, 1, 2, 3]))
        rows.append(row("Go.", edited(text(draw.randrange(30), 50), places, f"e{number}x"), line=number))
    rows = list({row.id: row for row in rows}.values())

    found = find(rows, threshold=0.7)

    assert {rows[place].id for place in found.kept} == slow_survivors(rows, 0.7)
    check_invariants(rows, found, 0.7)


def toolformer(shared_data: Path) -> list[Row]:
    records = json.loads((shared_data / "sft/gpteacher_toolformer_sim09.json").read_text())
    pairs = [(f"{record['instruction']}\n\n{record['input']}".strip(), record["response"]) for record in records]
    return [row(prompt, answer, line=line) for line, (prompt, answer) in enumerate(pairs, 1) if answer.strip()]


@pytest.mark.integration
def test_real_set_of_shared_preambles_keeps_its_distinct_rows(shared_data: Path) -> None:
    rows = toolformer(shared_data)

    found = find(rows, threshold=0.7)

    check_invariants(rows, found, 0.7)
    # 44 combinations of tools open all rows; those with fewer than ten rows of their own are not learnt.
    assert found.preambles.count >= 17
    assert found.preambles.rows > 0.97 * len(rows)
    assert len(found.dropped) < 0.01 * len(rows)


@pytest.mark.integration
def test_planted_copies_of_real_rows_go_and_no_other_row_does(shared_data: Path) -> None:
    rows = toolformer(shared_data)
    rows += [
        row(record["question"], record["answer"], line=line)
        for line, record in enumerate(map(json.loads, (shared_data / "sft/gsm8k_train.jsonl").open()))
    ]
    draw = random.Random(0)
    planted = []
    for line, original in enumerate(draw.sample(rows, 3800), 1):
        prompt, answer = (message.content for message in original.messages)
        words = answer.split(" ")
        place = draw.randrange(len(words))
        words[place] = f"edit{line}"
        planted.append(row(prompt, " ".join(words), "second", line))
    everything = [*rows, *planted]

    found = find(everything)

    # Every dropped row, not a sample, against the slow reference.
    check_invariants(everything, found, 0.8)
    assert len(found.dropped) >= 2000
    assert sum(drop.source == "second" for drop in found.dropped) > 0.98 * len(found.dropped)
