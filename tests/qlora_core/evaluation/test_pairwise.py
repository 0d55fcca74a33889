from collections.abc import Callable, Sequence

import pytest

from qlora_core.evaluation.pairwise import AnswerPair, Judgement, Question, judge_pairs, summarise_verdicts
from qlora_core.evaluation.verdict import Verdict

SETTINGS = {"confidence": 0.95, "resamples": 300, "seed": 0}


class RuleJudge:
    """Decides by a function of the question."""

    name = "rule"
    certified = False

    def __init__(self, rule: Callable[[Question], Judgement]) -> None:
        self.rule = rule
        self.asked = 0

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        self.asked += len(questions)
        advance(len(questions))
        return [self.rule(question) for question in questions]


def _longer(question: Question) -> Judgement:
    first, second = len(question.first_answer), len(question.second_answer)
    return Judgement("first" if first > second else "second" if second > first else "tie")


def _pairs(*answers: tuple[str, str]) -> list[AnswerPair]:
    return [AnswerPair(f"p{i}", "q", a, b) for i, (a, b) in enumerate(answers)]


def _run(judge: RuleJudge, pairs: list[AnswerPair]) -> list[Verdict]:
    done: list[float] = []
    verdicts = judge_pairs(judge, pairs, model_a="x", model_b="y", advance=done.append)
    assert sum(done) == len(verdicts) == 2 * len(pairs)
    return verdicts


def test_judge_pairs_gives_both_orders_by_model_not_by_slot() -> None:
    verdicts = _run(RuleJudge(_longer), _pairs(("long one", "short"), ("s", "longer")))
    assert [(v.prompt_id, v.first, v.verdict) for v in verdicts] == [
        ("p0", "a", "a"), ("p0", "b", "a"), ("p1", "a", "b"), ("p1", "b", "b"),
    ]  # fmt: skip


def test_judge_pairs_equal_answers_are_ties_that_nobody_is_asked_about() -> None:
    judge = RuleJudge(_longer)
    verdicts = _run(judge, _pairs(("same", "same \n")))
    assert [v.verdict for v in verdicts] == ["tie", "tie"]
    assert judge.asked == 0


def test_summarise_verdicts_win_rate_counts_a_tie_and_a_conflict_as_one_half() -> None:
    def rule(question: Question) -> Judgement:
        if "conflict" in question.first_answer + question.second_answer:
            return Judgement("first")
        return _longer(question)

    summary = summarise_verdicts(
        _run(RuleJudge(rule), _pairs(("longest", "b"), ("aa", "bb"), ("conflict", "b"), ("a", "bb"))), "x", **SETTINGS
    )
    assert summary["win_rate"] == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert summary["order_consistency"] == pytest.approx(3 / 4)
    other = summarise_verdicts(_run(RuleJudge(rule), _pairs(("longest", "b"))), "y", **SETTINGS)
    assert other["win_rate"] == 0.0


def test_summarise_verdicts_half_judged_prompt_is_left_out_and_counted() -> None:
    def rule(question: Question) -> Judgement:
        return Judgement(None, "timeout") if question.first_answer == "b" else _longer(question)

    summary = summarise_verdicts(_run(RuleJudge(rule), _pairs(("aaa", "b"), ("a", "bbb"))), "x", **SETTINGS)
    assert (summary["prompts"], summary["scored"], summary["unscored"]) == (1, 3, 1)
    assert summary["win_rate"] == 0.0
    assert summary["unscored_reasons"] == {"timeout": 1}


def test_summarise_verdicts_nothing_scored_has_no_win_rate() -> None:
    judge = RuleJudge(lambda question: Judgement(None, "budget: 1 USD are spent"))
    summary = summarise_verdicts(_run(judge, _pairs(("a", "b"))), "x", **SETTINGS)
    assert (summary["win_rate"], summary["low"], summary["order_consistency"]) == (None, None, None)
    assert summary["unscored_reasons"] == {"budget": 2}


def test_summarise_verdicts_judge_of_the_order_is_named() -> None:
    pairs = _pairs(*[("a", "b")] * 6)
    summary = summarise_verdicts(_run(RuleJudge(lambda question: Judgement("second")), pairs), "x", **SETTINGS)
    assert summary["win_rate"] == 0.5
    assert (summary["first_slot_share"], summary["order_consistency"]) == (0.0, 0.0)
    assert "chose the second slot in 100% of 12" in summary["warning"]
    fair = summarise_verdicts(_run(RuleJudge(_longer), _pairs(*[("aa", "b")] * 6)), "x", **SETTINGS)
    assert fair["warning"] is None
