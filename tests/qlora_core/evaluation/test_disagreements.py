from typing import Any

from qlora_core.evaluation.answer_book import AnswerBook, Prompt
from qlora_core.evaluation.comparisons import comparisons_of
from qlora_core.evaluation.disagreements import (
    against_the_ratings,
    judge_against_itself,
    people_against_judge,
    system_against_system,
)
from qlora_core.evaluation.verdict import Verdict

BOOK = AnswerBook()
for number in range(9):
    asked = Prompt(f"question {number}", "maths", f"reference {number}")
    for name in ("new", "old"):
        BOOK.add(name, f"p{number}", asked, f"{name} answer {number}")


def rows(prompt: str, first: str | None, second: str | None, votes: str = "") -> list[Verdict]:
    """The judge's verdicts in both orders, and one letter for each vote."""
    named: dict[str, Any] = {"prompt_id": prompt, "model_a": "new", "model_b": "old", "reason": "why"}
    told = {"a": "a", "b": "b", "t": "tie"}
    judged = [{**named, "verdict": v, "first": f, "judge": "j"} for v, f in ((first, "a"), (second, "b"))]
    people = [
        {**named, "verdict": told[v], "first": "a", "judge": f"human:{i}", "reason": None} for i, v in enumerate(votes)
    ]
    return [Verdict.model_validate(row) for row in judged + people]


def test_people_against_judge_ranks_by_distance_then_votes_then_prompt() -> None:
    found = [
        *rows("p1", "a", "a", "t"),  # one half apart
        *rows("p2", "a", "a", "b"),  # 1 apart, one vote
        *rows("p3", "b", "b", "aa"),  # 1 apart, two votes
        *rows("p4", "a", "a", "a"),  # agree
        *rows("p0", "b", "b", "aa"),
        *rows("p5", None, None, "b"),  # nothing to differ from
    ]
    ranking = people_against_judge(comparisons_of(found), BOOK, 3)
    assert [one.prompt_id for one in ranking.shown] == ["p0", "p3", "p2"]
    assert ranking.found == 4
    top = ranking.shown[0]
    assert (top.question, top.answers, top.reference) == (
        "question 0", ("new answer 0", "old answer 0"), "reference 0"
    )  # fmt: skip
    assert top.said == [("j, new shown first", "old (why)"), ("j, old shown first", "old (why)"), ("people", "new 2")]


def test_judge_against_itself_ranks_contradictions_before_ties() -> None:
    found = [*rows("p1", "a", "tie"), *rows("p2", "a", "b"), *rows("p3", "a", "a"), *rows("p4", "a", None)]
    ranking = judge_against_itself(comparisons_of(found), BOOK, 10)
    assert [(one.prompt_id, one.distance) for one in ranking.shown] == [("p2", 1.0), ("p1", 0.5)]


def test_against_the_ratings_takes_only_undivided_wins_of_the_lower_rated() -> None:
    found = [*rows("p1", "b", "b"), *rows("p2", "b", "a"), *rows("p3", "a", "a"), *rows("p4", "tie", "tie")]
    ranking = against_the_ratings(comparisons_of(found), {"new": 1100.0, "old": 900.0}, BOOK, 10)
    assert [(one.prompt_id, one.distance) for one in ranking.shown] == [("p1", 200.0)]
    only_people = [row for row in rows("p6", None, None, "bb") if row.judge != "j"]
    assert against_the_ratings(comparisons_of(only_people), {"new": 2.0, "old": 1.0}, BOOK, 1).found == 1


def test_texts_that_are_not_at_hand_are_none() -> None:
    (one,) = judge_against_itself(comparisons_of(rows("unknown", "a", "b")), BOOK, 1).shown
    assert (one.question, one.answers) == (None, (None, None))


def test_system_against_system_ranks_matches_before_losses_and_leaves_equal_answers() -> None:
    def row(name: str, answers: tuple[str, str], losses: Any, matches: Any) -> dict[str, Any]:
        asked = {"category": None, "question": "q", "reference": "r"}
        return {"prompt_id": name, **asked, "answers": answers, "losses": losses, "matches": matches}

    found = [
        row("far", ("x", "y"), (3.0, 1.0), (None, None)),
        row("near", ("x", "y"), (1.0, 1.1), (True, True)),
        row("hit", ("x", "y"), (1.0, 1.0), (True, False)),
        row("equal", ("x", " x"), (9.0, 1.0), (None, None)),
        row("unscored", ("x", "y"), (None, None), (False, False)),
    ]
    ranking = system_against_system(found, comparisons_of(rows("hit", "a", "b")), ("champion", "adapter"), 10)
    assert [one.prompt_id for one in ranking.shown] == ["hit", "far", "near"]
    assert ranking.title == "Adapter against champion"
    assert ranking.shown[0].said[:2] == [
        ("champion", "loss 1.000, matches the reference"), ("adapter", "loss 1.000, differs from the reference")
    ]  # fmt: skip
    assert ranking.shown[0].said[2][0] == "j, new shown first"
