"""Which rows hold evaluation items: each rule at its border, the evidence, and coverage against a slow reference."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import DecontaminateConfig
from qlora_core.data.decontamination.eval_sets import EvalItem, EvalSet
from qlora_core.data.decontamination.kernels import hash_ngrams
from qlora_core.data.decontamination.match import Decontamination, Hit, decontaminate
from qlora_core.data.decontamination.ngrams import index_ngrams, item_texts
from qlora_core.data.decontamination.overlaps import find_overlaps
from qlora_core.data.decontamination.words import split_words
from qlora_core.data.row import Draft, Message, Row, make_row

QUESTION = "A farmer has twelve brown hens and each of them lays two eggs on every day of the week but Sunday"
SHORT = "Why is the sky blue?"


def eval_set(*prompts: str | tuple[str, ...], name: str = "exam", stem: str | None = None) -> EvalSet:
    turns = [(prompt,) if isinstance(prompt, str) else prompt for prompt in prompts]
    return EvalSet(name, tuple(EvalItem(f"{name}/{n}", n, t, stem) for n, t in enumerate(turns, start=1)))


def row(prompt: str, answer: str = "Yes.", line: int = 1, system: str = "") -> Row:
    messages = [Message("user", prompt), Message("assistant", answer, train=True)]
    return make_row(Draft([Message("system", system), *messages]), "train.jsonl", line)


def find(prompts: Sequence[str | Row], *sets: EvalSet, **settings: Any) -> Decontamination:
    rows = [row(p, line=n) if isinstance(p, str) else p for n, p in enumerate(prompts, start=1)]
    found = decontaminate(rows, sets, DecontaminateConfig(**settings))
    assert sorted([*found.kept.tolist(), *(_position(rows, drop) for drop in found.dropped)]) == list(range(len(rows)))
    return found


def _position(rows: Sequence[Row], drop: Any) -> int:
    return next(n for n, row in enumerate(rows) if (row.id, row.line) == (drop.id, drop.line))


def only_hit(found: Decontamination) -> Hit:
    (hit,) = found.hits
    return hit


def test_an_equal_prompt_is_dropped_case_spacing_marks_and_wrapper_aside() -> None:
    wrapped = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWHY  is the Sky blue\n\n### Response:\n"
    )
    found = find([wrapped, "Why is the sea green?"], eval_set(SHORT))
    assert found.kept.tolist() == [1]
    (drop,) = found.dropped
    assert (drop.rule, drop.matched_id, drop.score, drop.line) == ("contamination", "exam/1", 1.0, 1)
    hit = only_hit(found)
    assert (hit.kind, hit.coverage, hit.text, hit.dropped) == ("exact", 1.0, "why is the sky blue", True)
    assert (hit.item_words, hit.row_words, hit.turn) == ((0, 5), (0, 5), 0)


def test_a_wrapped_item_is_found_bare() -> None:
    found = find([SHORT], eval_set(f"Q: {SHORT}\nA:"))
    assert only_hit(found).kind == "exact"


def test_a_tiny_prompt_is_reported_and_never_dropped() -> None:
    found = find(["Who are you?"], eval_set("Who are you?"))
    assert (found.kept.tolist(), found.dropped) == ([0], [])
    assert (only_hit(found).kind, only_hit(found).dropped) == ("exact", False)
    assert find(["Who are you?"], eval_set("Who are you?"), min_exact_words=3).kept.tolist() == []


def test_operators_tell_short_prompts_apart() -> None:
    found = find(["What is the value of 3 - 4?"], eval_set("What is the value of 3 + 4?"))
    assert found.kept.tolist() == [0]


@pytest.mark.parametrize(
    ("prompt", "dropped"),
    [
        (f"Answer briefly. {SHORT} Use one sentence.", True),
        (f"Question: {SHORT}", True),
        (f'She asked me: "{SHORT}"', True),
        ("Why is the sky blue on Mars?", False),
        ("Tell me why is the sky blue.", False),
    ],
)
def test_a_short_item_counts_as_sentences_of_its_own(prompt: str, dropped: bool) -> None:
    found = find([prompt], eval_set(SHORT))
    hit = only_hit(found)
    assert (hit.kind, hit.coverage, hit.dropped, len(found.dropped)) == ("short", 1.0, dropped, int(dropped))


def test_of_two_places_of_a_short_item_the_sentence_of_its_own_counts() -> None:
    found = find([f"Tell me {SHORT.lower()[:-1]} and so on. {SHORT}"], eval_set(SHORT))
    assert (only_hit(found).dropped, only_hit(found).row_words) == (True, (10, 15))


def test_endless_repetition_stays_small() -> None:
    found = find(["0 " * 200_000], eval_set("0 " * 2_000))
    assert (only_hit(found).kind, only_hit(found).coverage, only_hit(found).dropped) == ("ngram", 1.0, True)


def test_a_short_item_is_not_looked_for_in_answers() -> None:
    assert find([row("Give me a question.", answer=SHORT)], eval_set(SHORT)).hits == []


def test_ngrams_decide_by_coverage() -> None:
    words = QUESTION.split()
    assert len(words) == 21
    part = " ".join(words[:13])
    found = find([f"Once more: {part} and so on"], eval_set(QUESTION), min_coverage=13 / 21)
    hit = only_hit(found)
    assert (hit.kind, hit.coverage, hit.dropped) == ("ngram", 13 / 21, True)
    assert (hit.item_words, hit.row_words, hit.text) == ((0, 13), (2, 15), part.lower())
    assert found.dropped[0].score == 13 / 21
    shown = find([f"Once more: {part} and so on"], eval_set(QUESTION), min_coverage=0.62)
    assert (shown.kept.tolist(), only_hit(shown).dropped) == ([0], False)
    assert find([" ".join(words[:12])], eval_set(QUESTION)).hits == []


def test_action_report_drops_nothing() -> None:
    found = find([QUESTION, SHORT], eval_set(QUESTION, SHORT), action="report")
    assert (found.kept.tolist(), len(found.hits), found.sets["exam"].rows_dropped) == ([0, 1], 2, 0)


def test_an_answer_or_system_prompt_that_holds_an_item_is_found() -> None:
    in_answer = row("Make up a puzzle.", answer=f"Here it is: {QUESTION}.")
    in_system = row("Go on.", system=QUESTION, line=2)
    found = find([in_answer, in_system], eval_set(QUESTION))
    assert sorted((hit.kind, hit.turn, hit.coverage) for hit in found.hits) == [("answer", 1, 1.0), ("exact", 0, 1.0)]
    assert found.kept.tolist() == []


def test_later_turns_and_stems_need_an_ngram_to_drop() -> None:
    follow_up = "Can you explain that to me again?"
    turns = eval_set(("Tell me about the moons of Jupiter please.", follow_up))
    found = find([follow_up], turns)
    assert (found.kept.tolist(), only_hit(found).dropped) == ([0], False)
    assert find([QUESTION], eval_set(("Tell me about hens.", QUESTION))).kept.tolist() == []
    stem = "Which of the following is right?"
    choice = eval_set(f"{stem}\nA. red apples in the green grass\nB. blue apples in the sky", stem=stem)
    assert (only_hit(find([stem], choice)).dropped, find([stem], choice).kept.tolist()) == (False, [0])


def test_a_header_counts_for_nothing_and_is_reported() -> None:
    header = "The following are multiple choice questions (with answers) about"
    stems = [f"Number {n} costs {n} times {n + 7} coins in city {n * 31} so what is left" for n in range(20, 40)]
    exam = eval_set(*[f"{header} trade.\n\n{stem}" for stem in stems])
    harmless = f"{header} trade.\n\nWho sells bread to the baker if the miller has no flour and no water left?"
    bare = stems[3]
    found = find([harmless, bare], exam)
    assert found.kept.tolist() == [0]
    assert [(hit.line, hit.item_id, hit.coverage) for hit in found.hits] == [(2, "exam/4", 1.0)]
    (first, *_) = found.suppressed
    assert (first.items, first.text.startswith("the following are multiple choice questions with")) == (20, True)
    assert found.sets["exam"].suppressed == len(found.suppressed)


def test_a_header_is_one_only_within_its_set() -> None:
    spread = [eval_set(QUESTION, name=f"exam{n}") for n in range(12)]
    found = find([QUESTION], *spread)
    assert (len(found.hits), found.suppressed) == (12, [])
    assert found.dropped[0].matched_id == "exam0/1"


def test_the_best_covered_item_is_the_one_named() -> None:
    longer = f"{QUESTION} and how many eggs does she sell at market if every cake needs three of them"
    found = find([f"Well. {longer}"], eval_set(longer + " and one is broken on the way to the town", longer))
    assert found.dropped[0].matched_id == "exam/2"
    assert [hit.item_id for hit in found.hits] == ["exam/1", "exam/2"]


def test_counts_by_set() -> None:
    exam, other = (
        eval_set(QUESTION, SHORT, "Who are you?"),
        eval_set("What weighs more than ten elephants?", name="other"),
    )
    found = find([QUESTION, QUESTION, "Who are you?", "A quite harmless prompt."], exam, other)
    assert dataclasses.asdict(found.sets["exam"]) == {
        "items": 3, "items_hit": 2, "rows_hit": 3, "rows_dropped": 2, "suppressed": 0,
    }  # fmt: skip
    assert found.sets["other"].items_hit == 0


def test_empty_inputs() -> None:
    assert find([]).kept.tolist() == []
    assert find([SHORT]).kept.tolist() == [0]
    assert find([], eval_set(SHORT)).hits == []
    assert find(["?!", "😀"], eval_set("?!", "...")).kept.tolist() == [0, 1]
    assert only_hit(find(["?!"], eval_set("?!", "😀"))).item_id == "exam/1"


def test_rows_may_come_in_any_order_and_in_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"{QUESTION if n % 3 else SHORT} {'x' * n}", line=n) for n in range(1, 30)]
    exam, config = eval_set(QUESTION, SHORT), DecontaminateConfig()
    once = decontaminate(rows, [exam], config)
    monkeypatch.setattr("qlora_core.data.decontamination.match.BATCH_CHARACTERS", 100)
    again = decontaminate(rows[::-1], [exam], config)
    assert again.hits == once.hits
    assert sorted(len(rows) - 1 - again.kept) == once.kept.tolist()


def test_equal_hashes_of_other_words_are_no_hit() -> None:
    config = DecontaminateConfig(ngram_words=3)
    texts, _ = item_texts([eval_set("one two three")], config)
    index = index_ngrams(texts, config)
    row_words = split_words(["four five six"])
    forged = hash_ngrams(row_words.prefix, np.array([0]), np.array([3]))
    forged_index = dataclasses.replace(index, hashes=forged, seen=np.ones_like(index.seen))
    assert len(find_overlaps(row_words, np.array([False]), 3, texts, forged_index).text) == 0
    same = split_words(["one two three"])
    assert len(find_overlaps(same, np.array([False]), 3, texts, index).text) == 1


SENTENCES = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), min_size=1, max_size=18).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(SENTENCES, min_size=1, max_size=5),
    items=st.lists(SENTENCES, min_size=1, max_size=6),
    size=st.integers(3, 10),
    max_items=st.integers(1, 4),
)
def test_coverage_is_that_of_a_slow_reference(
    coverages: Callable[..., Any], header_words: Callable[..., Any],
    prompts: list[str], items: list[str], size: int, max_items: int,
) -> None:  # fmt: skip
    found = find(prompts, eval_set(*items), ngram_words=size, max_ngram_items=max_items, action="report")
    words = [item.split() for item in items]
    headers = header_words(words, min(size, 8), max_items)
    wanted = coverages([prompt.split() for prompt in prompts], words, size, headers)
    exact = {(p, i): 1.0 for p, prompt in enumerate(prompts) for i, item in enumerate(items) if prompt == item}
    hits = {(hit.line - 1, int(hit.item_id.split("/")[1]) - 1): hit for hit in found.hits}
    assert {key: hit.coverage for key, hit in hits.items() if hit.kind != "short"} == pytest.approx({**wanted, **exact})
    for (prompt, item), hit in hits.items():
        in_item, in_row = (slice(*span) for span in (hit.item_words, hit.row_words))
        assert words[item][in_item] == prompts[prompt].split()[in_row] == hit.text.split()
