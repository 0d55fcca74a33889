"""Replays recorded verdicts. Good for demonstrations, tests and reports on judgements of any origin; says nothing about
answers that were not in the record. Certified only as far as its record was: never by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from qlora_core.digest import digest_json
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.pairwise import Judgement, Question
from qlora_core.evaluation.verdict import Verdict


class ReplayJudge:
    """Answers by (prompt id, order) from a record; what the record lacks is unscored ("not_recorded")."""

    certified = False

    def __init__(self, record: Mapping[tuple[str, str], Judgement], *, name: str = "offline:replay") -> None:
        self.name = name
        self.cost_usd = 0.0
        self.snapshot: str | None = None
        self._record = record

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the record."""
        rows = [(*key, str(judgement.slot), str(judgement.reason)) for key, judgement in self._record.items()]
        return digest_json([self.name, sorted(rows)])

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        """One judgement per question, in order."""
        advance(len(questions))
        missing = Judgement(None, "not_recorded: the record has no verdict on this prompt and order")
        return [self._record.get((question.prompt_id, question.order), missing) for question in questions]


def replay_of(verdicts: Sequence[Verdict], *, model_a: str, model_b: str, name: str = "offline:replay") -> ReplayJudge:
    """A judge from verdict rows of two models, as `judge_pairs` asks it with the same `model_a` and `model_b`.

    Raises EvaluationError where the rows hold two verdicts on one prompt and order.
    """
    record: dict[tuple[str, str], Judgement] = {}
    for row in verdicts:
        if {row.model_a, row.model_b} != {model_a, model_b}:
            continue
        shown_first = row.model_a if row.first == "a" else row.model_b
        key = (row.prompt_id, "ab" if shown_first == model_a else "ba")
        if key in record:
            raise EvaluationError(f"two verdicts on prompt {row.prompt_id!r} in one order; keep one judge's rows")
        record[key] = Judgement(_slot(row), row.reason)
    return ReplayJudge(record, name=name)


def _slot(row: Verdict) -> Literal["first", "second", "tie"] | None:
    if row.verdict is None or row.verdict == "tie":
        return row.verdict
    return "first" if row.verdict == row.first else "second"
