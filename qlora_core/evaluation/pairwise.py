"""Pairwise judging of two systems in both orders, and what the verdicts add up to.

Knows the protocol a judge answers and the statistics of its verdicts, not how any judge decides. The unit is the
prompt: the two orders of one prompt are never counted as independent.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from qlora_core.evaluation.statistics.bootstrap import ratio_interval
from qlora_core.evaluation.verdict import Verdict

IDENTICAL = "identical answers"
SHOWN_FIRST: dict[Literal["ab", "ba"], Literal["a", "b"]] = {"ab": "a", "ba": "b"}
ONE_SLOT_SHARE = 0.9
ONE_SLOT_MIN_VERDICTS = 10


@dataclass(frozen=True)
class Question:
    """What a judge sees of one comparison: no model's name, only the order in which the answers are shown."""

    prompt_id: str
    text: str
    first_answer: str
    second_answer: str
    order: Literal["ab", "ba"]
    reference: str | None = None
    """A right answer, for judges that compare with one."""


class Judgement(NamedTuple):
    """A judge's decision by slot. None is unscored, and `reason` then says why; it never becomes a number.

    `points`: what a judge that scores gave to (first, second); the slot is the higher one's, equal ones tie.
    """

    slot: Literal["first", "second", "tie"] | None
    reason: str | None = None
    points: tuple[float, float] | None = None


class Judge(Protocol):
    """Whoever compares answers."""

    name: str

    @property
    def certified(self) -> bool:
        """Whether its verdicts may count as evidence: it has a certificate of its own that passed."""
        ...

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        """One judgement per question, in order; `advance(1)` for each that is settled."""
        ...


class AnswerPair(NamedTuple):
    """Two systems' answers to one prompt; `question` is what the user asked, without template marks."""

    prompt_id: str
    question: str
    answer_a: str
    answer_b: str
    reference: str | None = None


class Match(NamedTuple):
    """Two models whose answers to one prompt are to be compared."""

    model_a: str
    model_b: str
    pair: AnswerPair


def judge_pairs(
    judge: Judge, pairs: Sequence[AnswerPair], *, model_a: str, model_b: str, advance: Callable[[float], None]
) -> list[Verdict]:
    """Two verdicts per pair of one pair of models; see `judge_matches`."""
    return judge_matches(judge, [Match(model_a, model_b, pair) for pair in pairs], advance)


def judge_matches(judge: Judge, matches: Sequence[Match], advance: Callable[[float], None]) -> list[Verdict]:
    """Two verdicts per match, a shown first and b shown first, in the matches' order.

    Equal answers (white space at the ends aside) are ties without asking: nobody can tell them apart, and asking costs.
    """
    asked = [i for i, (_, _, pair) in enumerate(matches) if pair.answer_a.strip() != pair.answer_b.strip()]
    advance(2 * (len(matches) - len(asked)))
    questions = [question for i in asked for question in _both_orders(matches[i].pair)]
    places = [(i, order) for i in asked for order in SHOWN_FIRST]
    decided = dict(zip(places, judge.decide(questions, advance) if questions else [], strict=True))
    verdicts = []
    for i, (model_a, model_b, pair) in enumerate(matches):
        for order, first in SHOWN_FIRST.items():
            judgement = decided.get((i, order), Judgement("tie", IDENTICAL))
            verdicts.append(
                Verdict(
                    prompt_id=pair.prompt_id,
                    model_a=model_a,
                    model_b=model_b,
                    verdict=_by_model(judgement.slot, first),
                    first=first,
                    judge=judge.name,
                    reason=judgement.reason,
                    points=_points_by_model(judgement.points, first),
                )
            )
    return verdicts


def summarise_verdicts(
    verdicts: Sequence[Verdict], model: str, *, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """`model`'s win rate and what the judge is worth, from both-order verdicts of two systems.

    win_rate: mean over prompts of the mean over its two orders (win 1, tie .5), interval by bootstrap over prompts;
    only prompts with both orders scored count, since a single order carries its slot's bias. Null where there is none.
    order_consistency: share of those prompts, equal answers aside, whose two orders agree. first_slot_share: share of
    decided verdicts (no ties) that went to the answer shown first. scored and unscored count rows.
    """
    by_prompt: dict[str, list[Verdict]] = defaultdict(list)
    for row in verdicts:
        by_prompt[row.prompt_id].append(row)
    complete = [rows for rows in by_prompt.values() if {row.first for row in rows if row.scored} == {"a", "b"}]
    means = [
        float(np.mean([row.score_a if row.model_a == model else 1 - row.score_a for row in rows if row.scored]))
        for rows in complete
    ]
    rate = low = high = None
    if means:
        rate, low, high = ratio_interval(
            means, np.ones(len(means)), confidence=confidence, resamples=resamples, seed=seed
        )
    told_apart = [rows for rows in complete if any(row.reason != IDENTICAL for row in rows)]
    agreeing = [rows for rows in told_apart if len({row.verdict for row in rows if row.scored}) == 1]
    scored = sum(row.scored for row in verdicts)
    reasons = Counter((row.reason or "").split(":")[0] for row in verdicts if not row.scored)
    first_share = first_slot_share(verdicts)
    return {
        "win_rate": rate,
        "low": low,
        "high": high,
        "prompts": len(means),
        "scored": scored,
        "unscored": len(verdicts) - scored,
        "unscored_reasons": dict(sorted(reasons.items())),
        "order_consistency": len(agreeing) / len(told_apart) if told_apart else None,
        "first_slot_share": first_share,
        "warning": _order_warning(verdicts, first_share),
    }


def first_slot_share(verdicts: Sequence[Verdict]) -> float | None:
    """Share of decided verdicts (no ties) for the answer shown first; None where nothing was decided."""
    decided = [row for row in verdicts if row.verdict in ("a", "b")]
    return sum(row.verdict == row.first for row in decided) / len(decided) if decided else None


def _order_warning(verdicts: Sequence[Verdict], share: float | None) -> str | None:
    decided = sum(row.verdict in ("a", "b") for row in verdicts)
    if share is None or decided < ONE_SLOT_MIN_VERDICTS or max(share, 1 - share) < ONE_SLOT_SHARE:
        return None
    slot = "first" if share >= ONE_SLOT_SHARE else "second"
    return (
        f"the judge chose the {slot} slot in {max(share, 1 - share):.0%} of {decided} decided verdicts: "
        "it judges the order, not the answers; use another judge"
    )


def _both_orders(pair: AnswerPair) -> tuple[Question, Question]:
    return (
        Question(pair.prompt_id, pair.question, pair.answer_a, pair.answer_b, "ab", pair.reference),
        Question(pair.prompt_id, pair.question, pair.answer_b, pair.answer_a, "ba", pair.reference),
    )


def _points_by_model(points: tuple[float, float] | None, first: str) -> tuple[float, float] | None:
    if points is None:
        return None
    return points if first == "a" else (points[1], points[0])


def _by_model(slot: str | None, first: str) -> Literal["a", "b", "tie"] | None:
    if slot is None or slot == "tie":
        return slot
    return "a" if (slot == "first") == (first == "a") else "b"
