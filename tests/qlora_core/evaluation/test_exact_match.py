import pytest

from qlora_core.evaluation.exact_match import compare_matches, matches


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paris.", " paris", True),
        ('"New   York"', "new york", True),
        ("London", "Paris", False),
        ("", "Paris", False),
        ("1,000", "1000.0", True),
        ("-5", "5", False),
        ("3.5", "35", False),
        ("anything", "", None),
        ("one two three four", "one two three four", None),
        ("So 3 + 4 = 7\n#### 7", "a long explanation of it all <<3+4=7>>7 #### 7", True),
        ("The answer is 1,234.50 dollars", "x #### 1234.5", True),
        ("#### 7 and not 8", "x #### 8", False),
        ("#### 8 or 7", "x #### 8", True),
        ("no number", "x #### 8", False),
        ("about 80", "x #### 8", False),
        ("v2 has 8", "x #### 8", True),
        ("it is -4", "x #### -4", True),
    ],
)
def test_matches_case(answer: str, reference: str, expected: bool | None) -> None:
    assert matches(answer, reference, max_words=3) is expected


def test_compare_matches_leaves_out_what_cannot_be_compared() -> None:
    base, adapter = [True, False, None, False], [True, True, None, True]
    result = compare_matches(base, adapter, confidence=0.95, resamples=200, seed=0)
    assert result is not None
    assert (result["prompts"], result["base"], result["adapter"]) == (3, pytest.approx(1 / 3), 1.0)
    assert result["low"] <= result["difference"] <= result["high"]


def test_compare_matches_nothing_comparable_gives_none() -> None:
    assert compare_matches([None], [None], confidence=0.95, resamples=200, seed=0) is None
    assert compare_matches([], [], confidence=0.95, resamples=200, seed=0) is None
