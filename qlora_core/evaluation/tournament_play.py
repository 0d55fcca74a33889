"""Plays a tournament: the answers that meet next (`schedule`), before a judge in both orders, until a leader is clear.

Knows answers and a judge, not where either comes from. The order of prompts is drawn by a seed, so that a tournament
that was stopped meets the same questions again and pays for none of them twice.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.answer_book import AnswerBook
from qlora_core.evaluation.outage import check_outage
from qlora_core.evaluation.pairwise import AnswerPair, Judge, Match, judge_matches
from qlora_core.evaluation.schedule import Duel, Played, play
from qlora_core.evaluation.verdict import Verdict, read_verdicts, write_verdicts

LEAST_BATCH = 10


def most_verdicts(book: AnswerBook) -> int:
    """How many verdicts a tournament can take: every pair of models on every common prompt, in both orders."""
    return 2 * len(list(combinations(book.answers, 2))) * len(book.common)


def play_tournament(
    judge: Judge,
    book: AnswerBook,
    advance: Callable[[float], None],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    adaptive: bool = True,
    calls_in_flight: int = 1,
) -> Played:
    """Let all models of `book` meet on the prompts that each of them answered; see `schedule.play`.

    A round has as many duels as keep `calls_in_flight` calls busy, ten at least. Raises EvaluationError for fewer than
    two models or no common prompt, and JudgeUnavailableError where an outage took too many verdicts.
    """
    models = sorted(book.answers)
    if len(models) < 2:
        raise EvaluationError(f"a tournament needs two models or more, got {models}; give more --answers")
    if not book.common:
        counts = ", ".join(f"{model} {len(found)}" for model, found in sorted(book.answers.items()))
        raise EvaluationError(f"no prompt was answered by every model (answers: {counts}); give answers to one set")
    drawn = np.random.default_rng(seed).permutation(len(book.common))
    prompts = [book.common[place] for place in drawn]

    def judged(duels: Sequence[Duel]) -> list[Verdict]:
        return judge_matches(judge, [_match(book, duel) for duel in duels], advance)

    batch = max(LEAST_BATCH, calls_in_flight // 2)
    played = play(models, prompts, judged, batch=batch, confidence=confidence, adaptive=adaptive)
    check_outage(played.verdicts)
    return played


def keep_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write a tournament's rows, whole or not at all; see `check_replaceable`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write_verdicts(partial, list(verdicts))
    partial.replace(path)


def check_replaceable(path: Path, judge: str, models: Sequence[str]) -> None:
    """Refuse to play into a file whose rows are of another judge or of other models: they would be lost."""
    if not path.exists():
        return
    foreign = [
        row for row in read_verdicts(path) if row.judge != judge or not {row.model_a, row.model_b} <= set(models)
    ]
    if foreign:
        row = foreign[0]
        raise EvaluationError(
            f"{path} holds verdicts of {row.judge} on {row.model_a} and {row.model_b}, which this tournament would not "
            "write; name a file of its own, and rate both by joining them"
        )


def _match(book: AnswerBook, duel: Duel) -> Match:
    prompt = book.prompts[duel.prompt_id]
    answer_a, answer_b = (book.answers[model][duel.prompt_id] for model in (duel.model_a, duel.model_b))
    return Match(
        duel.model_a,
        duel.model_b,
        AnswerPair(duel.prompt_id, prompt.question, answer_a, answer_b, prompt.reference),
    )
