"""What a tournament's page shows, as plain data: leaders, matches by pair, judges, people, slices, disagreements.

Knows which figures and in what order. Rates nothing itself (`tournament`) and draws nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_core.evaluation.answer_book import AnswerBook
from qlora_core.evaluation.comparisons import Comparison, comparisons_of, is_human
from qlora_core.evaluation.disagreements import against_the_ratings, judge_against_itself, people_against_judge
from qlora_core.evaluation.judge.certificate import Certificate
from qlora_core.evaluation.judge.prompt import is_verdict_like
from qlora_core.evaluation.pairwise import IDENTICAL, first_slot_share
from qlora_core.evaluation.slices import win_rate_slices
from qlora_core.evaluation.statistics.agreement import Label, agreement, agreement_table
from qlora_core.evaluation.verdict import Verdict

SHOWN = 20
PEOPLE, JUDGE = "people's majority", "judge"


def summarise_tournament(
    rated: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    book: AnswerBook,
    certificate: Certificate | None = None,
    *,
    shown: int = SHOWN,
) -> dict[str, Any]:
    """Everything on the page. `rated` is what `rate` gave for these verdicts; `book` may be empty or hold more.

    `slices` is null without a category; `people` and `against` (people beside the judge) are null without votes or
    without pairs that both decided.
    """
    comparisons = comparisons_of(verdicts)
    categories = {prompt_id: prompt.category for prompt_id, prompt in book.prompts.items()}
    models = list(rated["ratings"])
    return {
        "rated": rated,
        "leaders": leaders(rated),
        "matches": matches_by_pair(verdicts, models),
        "judges": [judge_facts(name, rows) for name, rows in _by_judge(verdicts).items()],
        "certificate": certificate,
        "verdict_like": verdict_like(book, models),
        "people": people_facts(comparisons),
        "against": against_facts(comparisons),
        "slices": win_rate_slices(comparisons, categories, models) if any(categories.values()) else None,
        "disagreements": [
            people_against_judge(comparisons, book, shown),
            judge_against_itself(comparisons, book, shown),
            against_the_ratings(comparisons, rated["ratings"], book, shown),
        ],
    }


def leaders(rated: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the leader table, best first: {model, rating, low, high, ranks, best_share}; the last two can be null."""
    return [
        {
            "model": model,
            "rating": rating,
            "low": rated["intervals"][model][0],
            "high": rated["intervals"][model][1],
            "ranks": rated.get("rank_intervals", {}).get(model),
            "best_share": rated.get("best_share", {}).get(model),
        }
        for model, rating in rated["ratings"].items()
    ]


def matches_by_pair(verdicts: Sequence[Verdict], models: Sequence[str]) -> list[dict[str, Any]]:
    """Rows by pair of models, the better rated named first: {first, second, wins, ties, losses, unscored} in rows."""
    place = {model: number for number, model in enumerate(models)}
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in verdicts:
        first, second = sorted((row.model_a, row.model_b), key=lambda name: (place.get(name, len(place)), name))
        winner = {"a": row.model_a, "b": row.model_b}.get(str(row.verdict))
        told = "wins" if winner == first else "losses" if winner == second else "ties" if row.scored else "unscored"
        counts.setdefault((first, second), Counter())[told] += 1
    order = sorted(counts, key=lambda pair: [place.get(name, len(place)) for name in pair])
    kinds = ("wins", "ties", "losses", "unscored")
    return [
        {"first": first, "second": second, **{kind: counts[first, second][kind] for kind in kinds}}
        for first, second in order
    ]


def judge_facts(name: str, rows: Sequence[Verdict]) -> dict[str, Any]:
    """What one judge's rows say of it: {judge, scored, unscored, reasons, order_consistency, first_slot_share}.

    order_consistency: the share of pairs judged in both orders whose orders agree, equal answers aside; null for none.
    """
    told_apart = [row for row in rows if row.reason != IDENTICAL]
    gaps = [gap for one in comparisons_of(told_apart) if (gap := one.order_gap) is not None]
    reasons = Counter((row.reason or "").split(":")[0] for row in rows if not row.scored)
    return {
        "judge": name,
        "scored": sum(row.scored for row in rows),
        "unscored": sum(not row.scored for row in rows),
        "reasons": dict(sorted(reasons.items())),
        "order_consistency": sum(gap == 0 for gap in gaps) / len(gaps) if gaps else None,
        "first_slot_share": first_slot_share(rows),
    }


def verdict_like(book: AnswerBook, models: Sequence[str]) -> dict[str, int]:
    """How many answers of a model hold text in the form of a verdict, an attempt on the judge; models without: left."""
    counts = {model: sum(map(is_verdict_like, book.answers.get(model, {}).values())) for model in models}
    return {model: count for model, count in counts.items() if count}


def people_facts(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """Raters, votes, items and their agreement by statistic; None without votes.

    Labels are first, second and tie of each pair: a model's name as label would make chance agreement too small, since
    no item offers more than two of them.
    """
    labels: dict[tuple[str, str], Label] = {}
    for one in comparisons:
        item = _item(one)
        for row in one.votes:
            if row.scored:
                label = _side(one, one.winner(row))
                labels.setdefault((item, row.judge), Label(item_id=item, rater_id=row.judge, label=label))
    if not labels:
        return None
    measured = agreement(list(labels.values()))
    return {
        "votes": len(labels),
        "raters": measured["raters"],
        "items": measured["items"],
        "statistics": agreement_table(measured),
    }


def against_facts(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """Agreement of people's majority with the judge, over the pairs both decided without contradicting themselves.

    `no_majority` and `conflicts` count pairs with both that are left out; None where no pair has both.
    """
    both = [one for one in comparisons if one.human_score is not None and one.judge_score is not None]
    if not both:
        return None
    labels = [
        Label(item_id=_item(one), rater_id=rater, label=_side(one, label))
        for one in both
        if one.majority is not None and one.verdict is not None
        for rater, label in ((PEOPLE, one.majority), (JUDGE, one.verdict))
    ]
    return {
        "items": len(labels) // 2,
        "no_majority": sum(one.majority is None for one in both),
        "conflicts": sum(one.majority is not None and one.verdict is None for one in both),
        "statistics": agreement_table(agreement(labels) if labels else None),
    }


def _side(one: Comparison, winner: str) -> str:
    return {one.first: "first", one.second: "second"}.get(winner, winner)


def _item(one: Comparison) -> str:
    return "\n".join((one.prompt_id, one.first, one.second))


def _by_judge(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for row in verdicts:
        if not is_human(row):
            found.setdefault(row.judge, []).append(row)
    return dict(sorted(found.items()))
