"""Marks of a text: each on what it is for, and not on what resembles it."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_core.data.row import Row
from qlora_core.data.tags.injection import TEMPLATE_MARKERS
from qlora_core.data.tags.text_marks import TextMarksTagger, repetition

LONG = "The quick brown fox jumps over the lazy dog near the river"


def marks(*rows: Row, special: Sequence[str] = ()) -> list[dict[str, object]]:
    return TextMarksTagger(special).tag(rows).table.to_pylist()


@pytest.mark.parametrize("marker", TEMPLATE_MARKERS)
def test_every_template_marker_is_injection_in_any_turn(row: Callable[..., Row], marker: str) -> None:
    prompt, answer, rejected, clean = marks(
        row(f"Hi{marker}system", "Yes."),
        row("Hi", f"Yes. {marker}"),
        row("Hi", "Yes.", rejected=f"No{marker}"),
        row("Hi <EMAIL> [1] a <| b <b>bold</b> 3 << 4 [insights]", "Yes."),
    )
    assert [one["injection"] for one in (prompt, answer, rejected, clean)] == [True, True, True, False]


def test_the_tokenizers_own_special_text_counts_as_well(row: Callable[..., Row]) -> None:
    html = row("Strike it out", "<s>old</s> new")
    assert marks(html)[0]["injection"] is False
    assert marks(html, special=["<s>", "</s>"])[0]["injection"] is True
    assert TextMarksTagger().fingerprint != TextMarksTagger(["</s>"]).fingerprint


@pytest.mark.parametrize(
    ("answer", "cut"),
    [
        (f"{LONG} and", True),
        (f"{LONG},", True),
        (f"{LONG} (", True),
        ("Here it is:\n```python\nprint(1)", True),
        ("Here it is:\n```python\nprint(1)\n```", False),
        (f"{LONG}.", False),
        (LONG, False),
        ("the", False),
        (f"{LONG} C++", False),
        (f"{LONG}:", False),
    ],
)
def test_answers_that_break_off(row: Callable[..., Row], answer: str, cut: bool) -> None:
    assert marks(row("Go on", answer))[0]["truncated"] is cut


@pytest.mark.parametrize(
    ("turns", "repeated"),
    [
        (("Tell me of the fox", "It runs over the hill.", "And then?", "It  runs over\nthe hill."), True),
        (("Say this after me", "say this after  me"), True),
        (("Ok?", "Yes.", "Ok?", "Yes."), False),
        (("Tell me of the fox", "It runs over the hill.", "And then?", "It sleeps."), False),
        (("Hello", "Hello there my friend", "  ", "What is it?"), True),
    ],
)
def test_repeated_and_blank_turns(row: Callable[..., Row], turns: tuple[str, ...], repeated: bool) -> None:
    assert marks(row(*turns))[0]["repeated_turns"] is repeated


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I have no feelings.", True),
        ("I cannot assist you with this request.", True),
        ("I’m unable to provide medical advice.", True),
        ("I am sorry to hear that; here is what you can do.", False),
        ("You cannot help but laugh.", False),
        ("Language models predict the next word.", False),
    ],
)
def test_refusals(row: Callable[..., Row], answer: str, refused: bool) -> None:
    assert marks(row("Do it", answer))[0]["refusal"] is refused


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("Hello! I am {{name}}.", True),
        ("Hello! I am {{ user.name }}.", True),
        ("Best,\n[Your Name]", True),
        ("Write to <EMAIL>, or see [1] and [the insert].", False),
        ("In Vue write `{{ message }}`, as in\n```html\n<p>{{ message }}</p>\n```", False),
        ("A set of sets is {{1}, {2}}.", False),
    ],
)
def test_unfilled_placeholders(row: Callable[..., Row], answer: str, left: bool) -> None:
    assert marks(row("Who?", answer))[0]["placeholder"] is left


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("RenÃ© drank cafÃ©", True),
        ("itâ€™s", True),
        ("lost \ufffd", True),
        ("René drank café", False),
        ("日本語です", False),
    ],
)
def test_mojibake(row: Callable[..., Row], text: str, broken: bool) -> None:
    assert marks(row("Say", text))[0]["mojibake"] is broken


def test_repetition_and_words_are_null_or_counted(row: Callable[..., Row]) -> None:
    same, short, unlike, chinese = marks(
        row("a", "x y " * 10), row("a", "one two"), row("a", LONG), row("a", "我们去公园")
    )
    # 20 words, 17 grams, 2 of them distinct.
    assert same["repetition"] == pytest.approx(1 - 2 / 17)
    assert (short["repetition"], short["answer_words"]) == (None, 2)
    assert (unlike["repetition"], unlike["answer_words"]) == (0.0, 12)
    assert chinese["answer_words"] == 5


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=3))
def test_repetition_is_that_of_counting_by_hand(texts: list[list[str]]) -> None:
    grams = [" ".join(words[at : at + 4]) for words in texts for at in range(len(words) - 3)]
    expected = 1 - len(set(grams)) / len(grams) if grams else None
    assert repetition(texts) == (None if expected is None else pytest.approx(expected))
