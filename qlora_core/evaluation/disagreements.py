"""The most telling disagreements: where people and judge, the judge's two orders, or two systems differ most.

Three rankings, each by one stated rule, so that equal input gives equal pages. Knows comparisons, ratings and per-item
figures, not how they are shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_core.evaluation.answer_book import AnswerBook
from qlora_core.evaluation.comparisons import TIE, Comparison
from qlora_core.evaluation.verdict import Verdict

NO_REASON = frozenset({None, "unstated"})


class Disagreement(NamedTuple):
    """One prompt with two answers (None: not known) and who said what of them; `distance` is what ranks it."""

    prompt_id: str
    category: str | None
    question: str | None
    reference: str | None
    models: tuple[str, str]
    answers: tuple[str | None, str | None]
    said: list[tuple[str, str]]
    distance: float


class Ranking(NamedTuple):
    """`found` counts all, `shown` has the most telling of them; `rule` says in words how they are ranked."""

    title: str
    rule: str
    found: int
    shown: list[Disagreement]


def people_against_judge(comparisons: Sequence[Comparison], book: AnswerBook, count: int) -> Ranking:
    """Pairs whose mean vote and mean verdict differ, the farthest apart first, then those with most votes."""
    ranked = [
        (-abs(one.judge_score - one.human_score), -sum(one.tally.values()), one)
        for one in comparisons
        if one.judge_score is not None and one.human_score is not None and one.judge_score != one.human_score
    ]
    ranked.sort(key=lambda row: (*row[:2], _place(row[2])))
    return Ranking(
        "People against the judge",
        "Ranked by the distance between people's mean score and the judge's (win 1, tie ½, loss 0, both orders "
        "weighing the same), then by the number of votes, then by prompt.",
        len(ranked),
        [_described(one, book, -distance) for distance, _, one in ranked[:count]],
    )


def judge_against_itself(comparisons: Sequence[Comparison], book: AnswerBook, count: int) -> Ranking:
    """Pairs on which the judge's two orders differ: won and lost before won (or lost) and tied."""
    ranked = [(-gap, one) for one in comparisons if (gap := one.order_gap)]
    ranked.sort(key=lambda row: (row[0], _place(row[1])))
    return Ranking(
        "The judge against itself",
        "The same two answers, shown in the other order. Ranked by the distance between the scores of the two orders "
        "(an answer that won one and lost the other before one that won or lost one and tied), then by prompt.",
        len(ranked),
        [_described(one, book, -distance) for distance, one in ranked[:count]],
    )


def against_the_ratings(
    comparisons: Sequence[Comparison], ratings: Mapping[str, float], book: AnswerBook, count: int
) -> Ranking:
    """Pairs that every verdict (or, without a judge, the majority) gives to the lower rated model, the widest first."""
    ranked = []
    for one in comparisons:
        winner = one.verdict if one.judge_score is not None else one.majority
        if winner in (None, TIE) or not {one.first, one.second} <= ratings.keys():
            continue
        loser = one.second if winner == one.first else one.first
        distance = ratings[loser] - ratings[str(winner)]
        if distance > 0:
            ranked.append((-distance, one))
    ranked.sort(key=lambda row: (row[0], _place(row[1])))
    return Ranking(
        "Against the ratings",
        "The lower rated model wins by every verdict (without a judge: by most votes). Ranked by the distance of the "
        "two ratings, then by prompt.",
        len(ranked),
        [_described(one, book, -distance) for distance, one in ranked[:count]],
    )


def system_against_system(
    rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Comparison], models: tuple[str, str], count: int
) -> Ranking:
    """Prompts on which two systems differ most by the reference.

    A row: prompt_id, category, question, reference, answers (both), matches (both, null: not comparable), losses (both,
    nats per token of the reference; null: not scored). Equal answers do not differ.
    """
    said_of = {one.prompt_id: one for one in comparisons}
    ranked = []
    for row in rows:
        if row["answers"][0].strip() == row["answers"][1].strip():
            continue
        apart = None not in row["matches"] and row["matches"][0] != row["matches"][1]
        distance = 0.0 if None in row["losses"] else abs(row["losses"][0] - row["losses"][1])
        if apart or distance:
            ranked.append((not apart, -distance, row["prompt_id"], row))
    ranked.sort(key=lambda one: one[:3])
    return Ranking(
        f"{models[1].capitalize()} against {models[0]}",
        "Two different answers. Ranked first where one matches the reference and the other does not, then by how far "
        "apart the two systems' losses on the reference are (nats per token), then by prompt.",
        len(ranked),
        [_of_row(row, models, said_of.get(row["prompt_id"]), -distance) for _, distance, _, row in ranked[:count]],
    )


def _place(one: Comparison) -> tuple[str, str, str]:
    return one.prompt_id, one.first, one.second


def _described(one: Comparison, book: AnswerBook, distance: float) -> Disagreement:
    prompt = book.prompts.get(one.prompt_id)
    answers = tuple(book.answers.get(model, {}).get(one.prompt_id) for model in (one.first, one.second))
    return Disagreement(
        one.prompt_id,
        prompt.category if prompt else None,
        prompt.question if prompt else None,
        prompt.reference if prompt else None,
        (one.first, one.second),
        (answers[0], answers[1]),
        _said(one),
        distance,
    )


def _said(one: Comparison) -> list[tuple[str, str]]:
    rows = [(f"{row.judge}, {_shown_first(row)} shown first", _told(one, row)) for row in one.judged]
    if one.tally:
        rows.append(("people", ", ".join(f"{name} {count}" for name, count in one.tally.items())))
    return rows


def _shown_first(row: Verdict) -> str:
    return row.model_a if row.first == "a" else row.model_b


def _told(one: Comparison, row: Verdict) -> str:
    if not row.scored:
        return f"unscored ({row.reason})"
    points = "" if row.points is None else f" ({row.model_a} {row.points[0]:g}, {row.model_b} {row.points[1]:g})"
    reason = "" if row.reason in NO_REASON else f" ({row.reason})"
    return f"{one.winner(row)}{points}{reason}"


def _of_row(
    row: Mapping[str, Any], models: tuple[str, str], comparison: Comparison | None, distance: float
) -> Disagreement:
    said = []
    for model, loss, hit in zip(models, row["losses"], row["matches"], strict=True):
        told = [] if loss is None else [f"loss {loss:.3f}"]
        told += [] if hit is None else ["matches the reference" if hit else "differs from the reference"]
        said += [(model, ", ".join(told))] if told else []
    return Disagreement(
        row["prompt_id"],
        row["category"],
        row["question"],
        row["reference"],
        models,
        (row["answers"][0], row["answers"][1]),
        said + (_said(comparison) if comparison else []),
        distance,
    )
