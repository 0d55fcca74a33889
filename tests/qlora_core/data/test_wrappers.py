"""Wrappers that are taken off, and preambles that are learnt."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.wrappers import PAIRS, find_preambles, find_text_preambles, strip_wrappers

WORDS = [f"word{number}" for number in range(500)]


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def row(prompt: str, system: str = "") -> Row:
    turns = [Message("system", system)] if system else []
    return make_row(Draft([*turns, Message("user", prompt), Message("assistant", "Yes.", train=True)]), "rows", 1)


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_a_known_wrapper_comes_off_as_a_whole_only(opening: str, closing: str) -> None:
    assert strip_wrappers(f"{opening} What is it?\n\n{closing}\n") == "What is it?"
    for text in (
        f"{opening} What is it?",
        f"What is it?\n{closing}",
        f"{opening}\n{closing}",
        f"{opening} a\n{closing} b\n{opening} c\n{closing}",
    ):
        assert strip_wrappers(text) == text


@given(st.text(min_size=1))
def test_no_text_is_stripped_to_nothing(text: str) -> None:
    assert strip_wrappers(text)
    assert strip_wrappers(f"Q: {text} A:")


def test_the_longest_preamble_of_many_rows_is_learnt_and_taken_off() -> None:
    general = "The tools below are at hand. " + words(0, 12) + "\n"
    search = general + "search: " + words(1, 15) + ".\nsearch(query)\n"
    rows = [row(search + words(10 + n, 5)) for n in range(30)]
    rows += [row(general + words(50 + n, 5)) for n in range(30)]
    rows += [row(words(100 + n, 40)) for n in range(30)]

    found = find_preambles(rows)

    assert found.texts == (search.strip(), general.strip())
    assert (found.count, found.rows) == (2, 60)
    assert found.strip(search + "Who?") == found.strip(general + "Who?") == "Who?"
    assert found.strip(search) == search
    assert found.strip(general) == general
    assert found.strip(general.strip() + "er Who?") == general.strip() + "er Who?"
    assert found == find_preambles(random.Random(0).sample(rows, len(rows)))


def test_copies_of_one_text_teach_no_preamble() -> None:
    text = ". ".join(words(seed, 12) for seed in range(6))
    copies = [text.replace(word, "edit", 1) for word in text.split()[:60]]

    assert find_text_preambles(copies).texts == ()
    assert find_text_preambles([text] * 50).texts == ()
    assert find_text_preambles([]).count == 0


def test_common_ways_to_begin_are_no_preamble() -> None:
    assert find_text_preambles([f"What is the best: {words(n, 9)}" for n in range(40)]).texts == ()


def test_system_prompts_that_many_share_say_nothing_of_a_row() -> None:
    shared = "You speak like a pirate, " + words(1, 6)
    rows = [row(words(n, 10), shared) for n in range(20)] + [row("Sum up.", words(90 + n, 30)) for n in range(20)]

    found = find_preambles(rows)

    assert found.strip_system(f" {shared}\n") == ""
    assert found.strip_system("You are a helpful assistant.") == ""
    assert found.strip_system(words(90, 30)) == words(90, 30)


@pytest.mark.parametrize("times", [1, 2])
def test_preambles_of_any_script(times: int) -> None:
    tools = ["検索", "計算", "翻訳", "天気", "新聞", "地図", "辞書", "電話", "手紙"]
    opening = "以下の道具を使えます: " + " ".join(tools * times) + "。\n"

    found = find_text_preambles([f"{opening}質問 {words(n, 4)}" for n in range(20)])

    assert found.count == found.rows // 20 == 1
    assert found.strip(opening + "なぜ") == "なぜ"


def test_what_is_found_is_taken_off_and_what_is_too_short_is_not_found() -> None:
    opening = "一 二 三 四 五 六 七 八 九。\n"

    found = find_text_preambles([f"{opening}質問 {words(n, 4)}" for n in range(20)])

    assert (found.count, found.rows) == (0, 0)
