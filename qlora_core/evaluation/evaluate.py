"""The evaluate stage: one adapter against its base on the test split, by loss, exact match and a pairwise judge.

Knows which files an evaluation writes and reads back, not how models are run (`adapter_scores`), statistics (`heldout`,
`exact_match`, `pairwise`, `tournament`) or how a judge decides.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.data.dataset import PromptRow, TokenRow, read_labels, read_prompts
from qlora_core.digest import digest_json
from qlora_core.errors import EvaluationError, JudgeUnavailableError
from qlora_core.evaluation.adapter_facts import adapter_facts, folder_digest
from qlora_core.evaluation.adapter_scores import SPLIT, AdapterScorer, heldout_rows, open_scorer
from qlora_core.evaluation.behaviour import measure_behaviour
from qlora_core.evaluation.candidates import Scored, record_candidates
from qlora_core.evaluation.exact_match import compare_matches, matches
from qlora_core.evaluation.heldout import RowLoss, compare_losses
from qlora_core.evaluation.human_votes import human_scores
from qlora_core.evaluation.item_table import Answered, item_table, judge_scores
from qlora_core.evaluation.judge_cache import VerdictCache
from qlora_core.evaluation.judge_client import resolve_kind
from qlora_core.evaluation.judge_offline import LogProbJudge
from qlora_core.evaluation.judge_openai import OpenAIJudge, open_openai_judge
from qlora_core.evaluation.pairwise import AnswerPair, judge_pairs, summarise_verdicts
from qlora_core.evaluation.tournament import rate
from qlora_core.evaluation.verdict import Verdict, write_verdicts
from qlora_core.model.adapter_set import NamedAdapter
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

PASSING_REASONS = ("rate_limit", "timeout", "server_error", "connection", "quota", "unauthorized", "stopped")
MAX_LOST_SHARE = 0.1  # a few lost verdicts are counted and told; more are an outage
BASE = "base"
ADAPTER = "adapter"
REFERENCE = "reference"


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
        _open_endpoint(config, kind, environment, verdict_cache) as endpoint,
        open_scorer(config, quantized_folder, named, curated_folder, precision, residency) as scorer,
    ):
        systems = {BASE: None} | {name: name for name, _ in named}
        losses = {name: scorer.losses(rows, system) for name, system in systems.items()}
        answers = dict(zip(systems, scorer.answers(prompts, list(systems.values())), strict=True))
        verdicts = _judge(scorer, endpoint, kind, prompts, answers)
        _check_outage(verdicts)
        behaviour = measure_behaviour(config, scorer, prompts, None, ADAPTER)
    pair = losses[BASE], losses[ADAPTER]
    _write_row_losses(out / "rows.parquet", losses)
    _write_answers(out / "answers.jsonl", config, prompts, answers)
    write_verdicts(out / "verdicts.jsonl", verdicts)
    ratings = _rate(config, verdicts)
    _write_json(out / "ratings.json", ratings)
    evaluation = {
        "metrics": _metrics(config, prompts, pair, answers, _judge_metrics(config, endpoint, kind, verdicts)),
        "ratings": ratings.get("ratings", {}),
        **adapter_facts(config, adapter_folder, lineage or {}),
        "prompts_digest": digest_json([[row.id, question_text(row.messages)] for row in prompts]),
        "behaviour": behaviour,
        "items": _items(config, curated_folder, prompts, pair, answers, verdicts),
        "candidates": record_candidates(
            out,
            config,
            read_labels(curated_folder, SPLIT),
            prompts,
            [Scored(losses[system], answers[system]) for system in systems],
            [(trial, folder_digest(folder)) for trial, folder in candidates],
        ),
    }
    _write_json(out / "evaluation.json", evaluation)
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
) -> dict[str, Any]:
    """An evaluated adapter beside a reference adapter (a champion) on the same base, test rows and prompts.

    The evaluated one's losses and answers are read from its `evaluation_folder`; the reference is run here. Gives
    `heldout`, `exact_match`, `items` and, with `judged`, `judge` as in evaluation.json, the reference in the place of
    the base: a positive gain means that the evaluated adapter is better. `behaviour` needs both adapters at once, so it
    is null without `adapter_folder`, the evaluated one. Raises EvaluationError where the evaluation is of other rows or
    prompts, and what `evaluate_adapter` raises for a judge.
    """
    environment = os.environ if environment is None else environment
    rows = heldout_rows(config, curated_folder)
    prompts = read_prompts(curated_folder, SPLIT, config.max_prompts) if config.max_prompts else []
    recorded, by_adapter = _recorded(evaluation_folder, rows, prompts)
    named = [NamedAdapter(REFERENCE, reference_folder)]
    named += [NamedAdapter(ADAPTER, adapter_folder)] if adapter_folder is not None else []
    kind = resolve_kind(config.judge, environment) if judged and prompts else "none"
    with (
        _open_endpoint(config, kind, environment, verdict_cache) as endpoint,
        open_scorer(config, quantized_folder, named, curated_folder, precision, residency) as scorer,
    ):
        losses = scorer.losses(rows, REFERENCE)
        (by_reference,) = scorer.answers(prompts, (REFERENCE,))
        both = {BASE: by_reference, ADAPTER: by_adapter}
        verdicts = _judge(scorer, endpoint, kind, prompts, both)
        _check_outage(verdicts)
        watched = adapter_folder is not None
        behaviour = measure_behaviour(config, scorer, prompts, REFERENCE, ADAPTER) if watched else None
    judge = _judge_metrics(config, endpoint, kind, verdicts)
    return {
        **_metrics(config, prompts, (losses, recorded), both, judge),
        "behaviour": behaviour,
        "items": _items(config, curated_folder, prompts, (losses, recorded), both, verdicts),
    }


def _recorded(
    evaluation_folder: Path, rows: Sequence[TokenRow], prompts: Sequence[PromptRow]
) -> tuple[list[RowLoss], list[str]]:
    """The losses and answers of the adapter that an evaluation recorded, which must be of these rows and prompts."""
    losses = read_row_losses(evaluation_folder, ADAPTER)
    answers = _read_answers(evaluation_folder / "answers.jsonl", ADAPTER)
    if [row.id for row in rows] != [row.id for row in losses] or [row.id for row in prompts] != list(answers):
        raise EvaluationError(
            f"{evaluation_folder} evaluates {len(losses)} rows and {len(answers)} prompts, the data gives others "
            f"({len(rows)} and {len(prompts)}); evaluate again with the same data and evaluate section"
        )
    return losses, list(answers.values())


def read_row_losses(evaluation_folder: Path, model: Literal["base", "adapter"]) -> list[RowLoss]:
    """The losses an evaluation recorded, in its row order. Raises EvaluationError where rows.parquet cannot be read."""
    path = evaluation_folder / "rows.parquet"
    try:
        table = pq.read_table(path, columns=["id", f"{model}_nats", "tokens"])
    except (OSError, pa.ArrowException) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); evaluate again") from error
    return [RowLoss(*values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def question_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What was asked, without template marks: a lone user turn by itself, else all turns with their roles."""
    asked = list(messages[:-1]) if messages and messages[-1]["role"] == "assistant" else list(messages)
    if len(asked) == 1:
        return asked[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in asked)


@contextmanager
def _open_endpoint(
    config: EvaluateConfig, kind: str, environment: Mapping[str, str], verdict_cache: VerdictCache | None
) -> Iterator[OpenAIJudge | None]:
    """The endpoint's judge, reached once before minutes are spent on answers it may never see; None otherwise."""
    if kind != "openai":
        yield None
        return
    with open_openai_judge(config.judge, environment, verdict_cache) as endpoint:
        endpoint.check()
        yield endpoint


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
) -> dict[str, Any]:
    """The per-item table of the adapter beside what stands in the base's place."""
    before, after = (Answered(answers[side], _hits(config, prompts, answers[side])) for side in (BASE, ADAPTER))
    ids = [row.id for row in prompts]
    votes = None if config.votes is None else human_scores(Path(config.votes), ids, before.answers, after.answers)
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


def _judge(
    scorer: AdapterScorer,
    endpoint: OpenAIJudge | None,
    kind: str,
    prompts: Sequence[PromptRow],
    answers: Mapping[str, Sequence[str]],
) -> list[Verdict]:
    if kind == "none":
        return []
    compared = [
        AnswerPair(row.id, question_text(row.messages), by_adapter, by_base)
        for row, by_adapter, by_base in zip(prompts, answers[ADAPTER], answers[BASE], strict=True)
    ]
    with progress_bar("Judging", 2 * len(compared)) as advance:
        if endpoint is not None:
            return judge_pairs(endpoint, compared, model_a=ADAPTER, model_b=BASE, advance=advance)
        # No row has an adapter outside a scorer's own calls
        offline = LogProbJudge(scorer.adapters.base, scorer.chat.tokenizer, batch_size=scorer.config.batch_size)
        return judge_pairs(offline, compared, model_a=ADAPTER, model_b=BASE, advance=advance)


def _check_outage(verdicts: Sequence[Verdict]) -> None:
    """Refuse verdicts of which an outage has taken too many: kept as a result, they would never be asked for again."""
    lost = [row.reason for row in verdicts if row.verdict is None and (row.reason or "").startswith(PASSING_REASONS)]
    if len(lost) > MAX_LOST_SHARE * len(verdicts):
        raise JudgeUnavailableError(
            f"the judge left {len(lost)} of {len(verdicts)} verdicts unscored for faults that may pass "
            f"({', '.join(sorted(set(filter(None, lost))))}); its verdicts so far are kept: run the command again, "
            "or set evaluate.judge.kind: offline"
        )


def _judge_metrics(
    config: EvaluateConfig, endpoint: OpenAIJudge | None, kind: str, verdicts: Sequence[Verdict]
) -> dict[str, Any] | None:
    if kind == "none":
        return None
    summary = summarise_verdicts(
        verdicts, ADAPTER, confidence=config.confidence, resamples=config.resamples, seed=config.seed
    )
    if summary["warning"]:
        logger.warning("%s", summary["warning"])
    return {
        "kind": kind,
        "model": config.judge.model if endpoint is not None else "the quantized base",
        "certified": endpoint.certified if endpoint is not None else LogProbJudge.certified,
        **summary,
        **_judge_identity(endpoint),
        "cost_usd": endpoint.cost_usd if endpoint is not None else 0.0,
    }


def _judge_identity(endpoint: OpenAIJudge | None) -> dict[str, Any]:
    """What the judge was when it decided, and of which judge its certificate is; null for the offline judge."""
    if endpoint is None:
        return {"fingerprint": None, "snapshot": None, "certificate": None}
    given = endpoint.certificate
    kept = {"fingerprint", "snapshot", "gold_digest", "passed", "created"}
    return {
        "fingerprint": endpoint.fingerprint,
        "snapshot": endpoint.snapshot,
        "certificate": None if given is None else given.model_dump(mode="json", include=kept),
    }


def _write_row_losses(path: Path, losses: Mapping[str, Sequence[RowLoss]]) -> None:
    base = losses[BASE]
    columns: dict[str, list[Any]] = {"id": [row.id for row in base], "tokens": [row.tokens for row in base]}
    for model in (BASE, ADAPTER):
        columns[f"{model}_nats"] = [row.nats for row in losses[model]]
    pq.write_table(pa.table(columns), path)


def _write_answers(
    path: Path, config: EvaluateConfig, prompts: Sequence[PromptRow], answers: Mapping[str, Sequence[str]]
) -> None:
    hits = {model: _hits(config, prompts, answers[model]) for model in (BASE, ADAPTER)}
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for i, row in enumerate(prompts):
            record = {
                "prompt_id": row.id,
                "category": row.category,
                "question": question_text(row.messages),
                "reference": row.reference,
                **{model: answers[model][i] for model in (BASE, ADAPTER)},
                **{f"{model}_matches": hits[model][i] for model in (BASE, ADAPTER)},
            }
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _read_answers(path: Path, model: str) -> dict[str, str]:
    try:
        # Only \n ends a row: answers may hold other line separators
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {row["prompt_id"]: row[model] for row in rows}
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); evaluate again") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
