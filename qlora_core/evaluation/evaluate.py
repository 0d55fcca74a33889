"""The evaluate stage: one adapter against its base on the test split, by loss, exact match and a pairwise judge.

Knows which files an evaluation writes and reads back, not how models are run (`adapter_scores`), statistics (`heldout`,
`exact_match`, `pairwise`, `tournament`) or how a judge decides.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.data.dataset import PromptRow, TokenRow, read_labels, read_prompts
from qlora_core.digest import digest_json
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.adapter_facts import adapter_facts, folder_digest
from qlora_core.evaluation.adapter_scores import SPLIT, AdapterScorer, heldout_rows, open_scorer
from qlora_core.evaluation.answer_book import Prompt
from qlora_core.evaluation.behaviour import measure_behaviour
from qlora_core.evaluation.candidates import Scored, record_candidates
from qlora_core.evaluation.evaluation_files import (
    ADAPTER,
    ANSWERS_FILE,
    BASE,
    question_text,
    read_answers,
    read_row_losses,
    write_answers,
    write_json,
    write_model_answers,
    write_row_losses,
)
from qlora_core.evaluation.exact_match import compare_matches, matches
from qlora_core.evaluation.heldout import RowLoss, compare_losses
from qlora_core.evaluation.human_votes import HumanScores, human_scores
from qlora_core.evaluation.item_table import Answered, item_table, judge_scores
from qlora_core.evaluation.judge.cache import VerdictCache
from qlora_core.evaluation.judge.choice import ChosenJudge, open_judge
from qlora_core.evaluation.judge.client import resolve_kind
from qlora_core.evaluation.judge.offline import LogProbJudge
from qlora_core.evaluation.outage import check_outage
from qlora_core.evaluation.pairwise import AnswerPair, judge_pairs
from qlora_core.evaluation.tournament import rate
from qlora_core.evaluation.verdict import Verdict, write_verdicts
from qlora_core.model.adapter_set import NamedAdapter
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

REFERENCE = "reference"
REFERENCE_ANSWERS, REFERENCE_VERDICTS = "reference_answers.jsonl", "reference_verdicts.jsonl"
VOTES_FILE = "votes.jsonl"


def evaluate_adapter(
    config: EvaluateConfig,
    quantized_folder: Path,
    adapter_folder: Path,
    curated_folder: Path,
    out: Path,
    *,
    precision: str = "auto",
    residency: Mapping[str, Any] | None = None,
    verdict_cache: VerdictCache | None = None,
    lineage: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    candidates: Sequence[NamedAdapter] = (),
) -> dict[str, Any]:
    """Evaluate the adapter and fill `out`: rows.parquet, answers.jsonl, verdicts.jsonl, ratings.json, evaluation.json.

    With `config.votes` people's votes on these answers are there too, as verdict rows (votes.jsonl).

    `candidates` are a sweep's, by trial, best first, so that the first one is the adapter itself. All are scored over
    one loaded base and answer a batch of prompts in one pass; see `record_candidates` for what is kept of them. The
    judge is asked about the adapter alone.

    `lineage` gives data_digest and quantized_base_digest to record (null where absent), and adapter_digest (else the
    digest of the adapter folder's files). `environment` holds the judge's key and address (None: the process's own).
    `verdict_cache` None keeps verdicts for this call only. `residency` are the arguments of `load_quantized` on how
    layers execute.

    Raises EvaluationError where the test split has fewer than two rows, JudgeError where the judge cannot be asked at
    all and ConfigError where its price is unknown: both before the model is loaded, as far as they can be known then.
    """
    environment = os.environ if environment is None else environment
    rows = heldout_rows(config, curated_folder)
    prompts = read_prompts(curated_folder, SPLIT, config.max_prompts) if config.max_prompts else []
    kind = resolve_kind(config.judge, environment) if prompts else "none"
    out.mkdir(parents=True, exist_ok=True)
    named = [NamedAdapter(ADAPTER, adapter_folder), *candidates[1:]]
    with (
        open_judge(config, kind, environment, verdict_cache, _asked(prompts)) as chosen,
        open_scorer(config, quantized_folder, named, curated_folder, precision, residency) as scorer,
    ):
        systems = {BASE: None} | {name: name for name, _ in named}
        losses = {name: scorer.losses(rows, system) for name, system in systems.items()}
        answers = dict(zip(systems, scorer.answers(prompts, list(systems.values())), strict=True))
        verdicts = _judge(scorer, chosen, prompts, answers)
        check_outage(verdicts)
        behaviour = measure_behaviour(config, scorer, prompts, None, ADAPTER)
    pair = losses[BASE], losses[ADAPTER]
    votes = _votes(config, prompts, answers)
    write_row_losses(out / "rows.parquet", losses)
    hits = {model: _hits(config, prompts, answers[model]) for model in (BASE, ADAPTER)}
    write_answers(out / ANSWERS_FILE, prompts, answers, hits)
    write_verdicts(out / "verdicts.jsonl", verdicts)
    if votes is not None:
        write_verdicts(out / VOTES_FILE, votes.rows)
    ratings = _rate(config, verdicts)
    write_json(out / "ratings.json", ratings)
    evaluation = {
        "metrics": _metrics(config, prompts, pair, answers, _judge_metrics(chosen, verdicts)),
        "ratings": ratings.get("ratings", {}),
        **adapter_facts(config, adapter_folder, lineage or {}),
        "prompts_digest": digest_json([[row.id, question_text(row.messages)] for row in prompts]),
        "behaviour": behaviour,
        "items": _items(config, curated_folder, prompts, pair, answers, verdicts, votes),
        "candidates": record_candidates(
            out,
            config,
            read_labels(curated_folder, SPLIT),
            prompts,
            [Scored(losses[system], answers[system]) for system in systems],
            [(trial, folder_digest(folder)) for trial, folder in candidates],
        ),
    }
    write_json(out / "evaluation.json", evaluation)
    return evaluation


def compare_adapters(
    config: EvaluateConfig,
    quantized_folder: Path,
    *,
    reference_folder: Path,
    evaluation_folder: Path,
    curated_folder: Path,
    precision: str = "auto",
    residency: Mapping[str, Any] | None = None,
    adapter_folder: Path | None = None,
    judged: bool = False,
    verdict_cache: VerdictCache | None = None,
    environment: Mapping[str, str] | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """An evaluated adapter beside a reference adapter (a champion) on the same base, test rows and prompts.

    The evaluated one's losses and answers are read from its `evaluation_folder`; the reference is run here. Gives
    `heldout`, `exact_match`, `items` and, with `judged`, `judge` as in evaluation.json, the reference in the place of
    the base: a positive gain means that the evaluated adapter is better. `behaviour` needs both adapters at once, so it
    is null without `adapter_folder`, the evaluated one. The reference's answers and the verdicts go into `out`, where
    it is given (reference_answers.jsonl, reference_verdicts.jsonl). Raises EvaluationError where the evaluation is of
    other rows or prompts, and what `evaluate_adapter` raises for a judge.
    """
    environment = os.environ if environment is None else environment
    rows = heldout_rows(config, curated_folder)
    prompts = read_prompts(curated_folder, SPLIT, config.max_prompts) if config.max_prompts else []
    recorded, by_adapter = _recorded(evaluation_folder, rows, prompts)
    named = [NamedAdapter(REFERENCE, reference_folder)]
    named += [NamedAdapter(ADAPTER, adapter_folder)] if adapter_folder is not None else []
    kind = resolve_kind(config.judge, environment) if judged and prompts else "none"
    with (
        open_judge(config, kind, environment, verdict_cache, _asked(prompts)) as chosen,
        open_scorer(config, quantized_folder, named, curated_folder, precision, residency) as scorer,
    ):
        losses = scorer.losses(rows, REFERENCE)
        (by_reference,) = scorer.answers(prompts, (REFERENCE,))
        both = {BASE: by_reference, ADAPTER: by_adapter}
        verdicts = _judge(scorer, chosen, prompts, both)
        check_outage(verdicts)
        watched = adapter_folder is not None
        behaviour = measure_behaviour(config, scorer, prompts, REFERENCE, ADAPTER) if watched else None
    votes = _votes(config, prompts, both)
    if out is not None:
        write_model_answers(out / REFERENCE_ANSWERS, prompts, REFERENCE, by_reference)
        write_verdicts(out / REFERENCE_VERDICTS, [row.model_copy(update={"model_b": REFERENCE}) for row in verdicts])
    return {
        **_metrics(config, prompts, (losses, recorded), both, _judge_metrics(chosen, verdicts)),
        "behaviour": behaviour,
        "items": _items(config, curated_folder, prompts, (losses, recorded), both, verdicts, votes),
    }


def _recorded(
    evaluation_folder: Path, rows: Sequence[TokenRow], prompts: Sequence[PromptRow]
) -> tuple[list[RowLoss], list[str]]:
    """The losses and answers of the adapter that an evaluation recorded, which must be of these rows and prompts."""
    losses = read_row_losses(evaluation_folder, ADAPTER)
    answers = read_answers(evaluation_folder / ANSWERS_FILE, ADAPTER)
    if [row.id for row in rows] != [row.id for row in losses] or [row.id for row in prompts] != list(answers):
        raise EvaluationError(
            f"{evaluation_folder} evaluates {len(losses)} rows and {len(answers)} prompts, the data gives others "
            f"({len(rows)} and {len(prompts)}); evaluate again with the same data and evaluate section"
        )
    return losses, list(answers.values())


def _rate(config: EvaluateConfig, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    if not any(verdict.scored for verdict in verdicts):
        return {}
    return rate(verdicts, seed=config.seed, confidence=config.confidence)


def _metrics(
    config: EvaluateConfig,
    prompts: Sequence[PromptRow],
    losses: tuple[Sequence[RowLoss], Sequence[RowLoss]],
    answers: Mapping[str, Sequence[str]],
    judge: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "heldout": _compare_losses(config, *losses),
        "exact_match": _compare_answers(config, prompts, answers[BASE], answers[ADAPTER]),
        "judge": judge,
    }


def _compare_losses(config: EvaluateConfig, before: Sequence[RowLoss], after: Sequence[RowLoss]) -> dict[str, Any]:
    return compare_losses(before, after, confidence=config.confidence, resamples=config.resamples, seed=config.seed)


def _compare_answers(
    config: EvaluateConfig, prompts: Sequence[PromptRow], before: Sequence[str], after: Sequence[str]
) -> dict[str, Any] | None:
    return compare_matches(
        _hits(config, prompts, before),
        _hits(config, prompts, after),
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
    )


def _items(
    config: EvaluateConfig,
    curated_folder: Path,
    prompts: Sequence[PromptRow],
    losses: tuple[Sequence[RowLoss], Sequence[RowLoss]],
    answers: Mapping[str, Sequence[str]],
    verdicts: Sequence[Verdict],
    votes: HumanScores | None,
) -> dict[str, Any]:
    """The per-item table of the adapter beside what stands in the base's place."""
    before, after = (Answered(answers[side], _hits(config, prompts, answers[side])) for side in (BASE, ADAPTER))
    return item_table(
        losses=losses,
        labels=read_labels(curated_folder, SPLIT),
        prompts=prompts,
        questions=[question_text(row.messages) for row in prompts],
        answered=(before, after),
        judge=judge_scores(verdicts, ADAPTER),
        human=votes,
    )


def _hits(config: EvaluateConfig, prompts: Sequence[PromptRow], answers: Sequence[str]) -> list[bool | None]:
    return [
        matches(answer, row.reference, config.exact_match_max_words)
        for answer, row in zip(answers, prompts, strict=True)
    ]


def _votes(
    config: EvaluateConfig, prompts: Sequence[PromptRow], answers: Mapping[str, Sequence[str]]
) -> HumanScores | None:
    if config.votes is None:
        return None
    return human_scores(Path(config.votes), [row.id for row in prompts], answers[BASE], answers[ADAPTER])


def _asked(prompts: Sequence[PromptRow]) -> dict[str, Prompt]:
    return {row.id: Prompt(question_text(row.messages), row.category, row.reference) for row in prompts}


def _judge(
    scorer: AdapterScorer,
    chosen: ChosenJudge,
    prompts: Sequence[PromptRow],
    answers: Mapping[str, Sequence[str]],
) -> list[Verdict]:
    if chosen.kind == "none":
        return []
    compared = [
        AnswerPair(row.id, question_text(row.messages), by_adapter, by_base, row.reference)
        for row, by_adapter, by_base in zip(prompts, answers[ADAPTER], answers[BASE], strict=True)
    ]
    # No row has an adapter outside a scorer's own calls
    judge = chosen.judge(
        lambda: LogProbJudge(scorer.adapters.base, scorer.chat.tokenizer, batch_size=scorer.config.batch_size)
    )
    with progress_bar("Judging", 2 * len(compared)) as advance:
        return judge_pairs(judge, compared, model_a=ADAPTER, model_b=BASE, advance=advance)


def _judge_metrics(chosen: ChosenJudge, verdicts: Sequence[Verdict]) -> dict[str, Any] | None:
    judge = chosen.metrics(verdicts, ADAPTER)
    if judge is not None and judge["warning"]:
        logger.warning("%s", judge["warning"])
    return judge
