"""Refusals, degenerate answers and forms, on texts written by hand, each with its negative."""

import pytest

from qlora_core.evaluation.answer_checks import is_degenerate, is_refusal, keeps_form, word_count


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I cannot assist with this request.",
        "I cannot provide medical advice.",
        "As an AI language model, I am unable to browse the web.",
        "Unfortunately, I am not able to share that.",
        "I won't write that.",
        "I must decline.",
    ],
)
def test_refusals_are_seen(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "The capital is Paris.",
        "You cannot divide by zero, so the limit is taken instead.",
        "Sorry to hear that! Try restarting the router.",
        "The story ends well. " * 12 + "I cannot say more.",
        "",
    ],
)
def test_answers_are_not_taken_for_refusals(answer: str) -> None:
    assert not is_refusal(answer)


LOOP = "the cat sat on the mat and " * 10


@pytest.mark.parametrize("answer", ["", "  \n", "What is 2 + 2?", " What is 2 + 2?\n", LOOP, "哈" * 60])
def test_degenerate_answers_are_seen(answer: str) -> None:
    assert is_degenerate(answer, "What is 2 + 2?")


@pytest.mark.parametrize(
    "answer",
    [
        "4",
        "yes yes yes yes",  # short: an emphasis, not a loop
        "First mix flour with water, let it rest for an hour, then knead it, shape it, bake it hot, and cool it well.",
        "在春天的早晨，小鸟在树上唱歌，孩子们在花园里玩耍，老人坐在长椅上看书，微风轻轻吹过湖面，阳光照在每个人的脸上。",
    ],
)
def test_sound_answers_are_not_taken_for_degenerate(answer: str) -> None:
    assert not is_degenerate(answer, "What is 2 + 2?")


def test_words_are_counted_also_where_no_spaces_are() -> None:
    assert (word_count("one two  three\n"), word_count(""), word_count("春" * 50)) == (3, 0, 50)


@pytest.mark.parametrize(
    ("answer", "reference", "kept"),
    [
        ('{"a": 1}', '{"b": 2}', True),
        ("[1]", '{"b": 2}', True),
        ("Here: {}", '{"b": 2}', False),
        ("so it is\n#### 12", "thus\n#### 10", True),
        ("it is 10", "thus\n#### 10", False),
        ("anything", "a plain sentence", None),
        ("anything", "12", None),  # a bare number is JSON, but no form
    ],
)
def test_form_of_the_reference(answer: str, reference: str, kept: bool | None) -> None:
    assert keeps_form(answer, reference) is kept
