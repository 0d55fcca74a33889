"""A tournament under a config's judge: of answers given as files, else of the config's own base, champion, candidates.

Knows where judge, money, cache and answers come from; `tournament_play` plays.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_core.errors import ConfigError
from qlora_core.evaluation.answer_book import AnswerBook, read_answer_book
from qlora_core.evaluation.judge.choice import open_judge
from qlora_core.evaluation.pairwise import Judge
from qlora_core.evaluation.schedule import Played
from qlora_core.evaluation.tournament_play import check_replaceable, keep_verdicts, most_verdicts, play_tournament
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.pipeline.stages import evaluate_settings, paid_verdicts
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

CHAMPION = "champion"


def answers_of(pipeline: Pipeline) -> AnswerBook:
    """What the evaluation of this config answered: base, best adapter, other candidates, and the champion beside them.

    Runs the stages that it needs. A champion that is this very adapter, or that is over another base, is not there.
    """
    from qlora_core.evaluation.evaluate import REFERENCE_ANSWERS
    from qlora_core.pipeline.promotion import Promotion

    sources = [str(pipeline.run("evaluate").artifact.path)]
    compared = Promotion(pipeline).gate().result.artifact.path / REFERENCE_ANSWERS
    if compared.is_file():
        sources.append(f"{CHAMPION}={compared}")
    return read_answer_book(sources)


def play_from_config(
    pipeline: Pipeline,
    sources: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    adaptive: bool = True,
) -> tuple[Played, AnswerBook, dict[str, Any]]:
    """Play, write the verdict rows to `out`, and give them with the answers and the judge's facts.

    `sources` as `read_answer_book` takes them; empty means the config's own. What is paid for is in the verdict cache
    before it is used, so that the same call goes on after a kill. Raises ConfigError where evaluate.judge is none.
    """
    settings = evaluate_settings(pipeline.job)
    kind = settings.judge.kind
    if kind == "none":
        raise ConfigError("evaluate.judge.kind is none, and a tournament is played before a judge; set another kind")
    book = read_answer_book(sources) if sources else answers_of(pipeline)
    with (
        paid_verdicts(pipeline.job) as verdicts,
        open_judge(settings, kind, os.environ, verdicts, book.prompts) as chosen,
    ):
        judge = chosen.judge(lambda: _local_judge(pipeline))
        check_replaceable(out, judge.name, list(book.answers))
        with progress_bar("Judging", most_verdicts(book)) as advance:
            played = play_tournament(
                judge,
                book,
                advance,
                seed=seed,
                confidence=confidence,
                adaptive=adaptive,
                calls_in_flight=settings.judge.calls_in_flight,
            )
        facts = chosen.facts
    keep_verdicts(out, played.verdicts)
    return played, book, facts


def _local_judge(pipeline: Pipeline) -> Judge:
    """The config's quantized base, by log-probability."""
    from qlora_core.data.chat_template import load_chat_tokenizer
    from qlora_core.evaluation.judge.offline import LogProbJudge
    from qlora_core.model.base import load_quantized

    config = pipeline.job.config
    quantized, curated = (pipeline.run(name).artifact.path for name in ("quantize", "curate"))
    base = load_quantized(quantized, precision=config.train.precision, **config.compute.residency_settings)
    tokenizer = load_chat_tokenizer(curated / "tokenizer", None).tokenizer
    return LogProbJudge(base, tokenizer, batch_size=config.evaluate.batch_size)
