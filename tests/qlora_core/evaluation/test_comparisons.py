from typing import Any

import pytest

from qlora_core.evaluation.comparisons import comparisons_of
from qlora_core.evaluation.verdict import Verdict


def row(verdict: str | None, first: str = "a", judge: str = "j", prompt: str = "p", **fields: Any) -> Verdict:
    named = {"prompt_id": prompt, "model_a": "new", "model_b": "old", "judge": judge}
    return Verdict.model_validate({**named, "verdict": verdict, "first": first, **fields})


def test_each_order_weighs_the_same_however_many_rows_it_has() -> None:
    (one,) = comparisons_of([row("a"), row("a", judge="k"), row("b", "b")])
    assert one.judge_score == pytest.approx(0.5)  # (1 and 1 in one order, 0 in the other)


def test_scores_are_of_the_first_model_by_name_whatever_side_it_has_in_a_row() -> None:
    swapped = row("a", model_a="old", model_b="new")
    (one,) = comparisons_of([row("b"), swapped])
    assert (one.first, one.second, one.judge_score, one.verdict) == ("new", "old", 0.0, "old")


def test_order_gap_is_within_a_judge_and_none_in_one_order() -> None:
    assert comparisons_of([row("a"), row("b", "b")])[0].order_gap == 1.0
    assert comparisons_of([row("a"), row("tie", "b")])[0].order_gap == 0.5
    # Two judges that differ, each in one order: neither contradicts itself
    assert comparisons_of([row("a"), row("b", "b", judge="k")])[0].order_gap is None


def test_people_are_apart_from_judges_and_a_majority_stands_alone() -> None:
    votes = [row("a", judge="human:ann"), row("a", judge="human:ben"), row("tie", judge="human:cy")]
    (one,) = comparisons_of([row("b"), *votes])
    assert (len(one.judged), one.judge_score, one.human_score) == (1, 0.0, pytest.approx(2.5 / 3))
    assert (one.majority, one.tally) == ("new", {"new": 2, "tie": 1})
    (even,) = comparisons_of([row("a", judge="human:ann"), row("b", judge="human:ben")])
    assert even.majority is None
    assert even.score == 0.5


def test_unscored_rows_are_no_number() -> None:
    (one,) = comparisons_of([row(None, reason="timeout"), row("a", "b")])
    assert (one.judge_score, one.order_gap, one.verdict) == (1.0, None, "new")
    (none,) = comparisons_of([row(None, reason="timeout")])
    assert (none.judge_score, none.human_score, none.score, none.verdict) == (None, None, None, None)
