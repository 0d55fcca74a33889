"""The evaluate stage: one adapter against its base on the test split, by loss, exact match and a pairwise judge.

The base is loaded once; "base" is the same model with the adapter switched off. Knows the folders of the stages before
it and which files it writes, not statistics (`heldout`, `exact_match`, `pairwise`, `tournament`) or judging.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from peft import PeftModel

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.dataset import PromptRow, TokenRow, read_prompts, read_split
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.exact_match import compare_matches, matches
from qlora_core.evaluation.heldout import RowLoss, compare_losses
from qlora_core.evaluation.judge_client import resolve_kind
from qlora_core.evaluation.judge_offline import LogProbJudge
from qlora_core.evaluation.judge_openai import OpenAIJudge, open_openai_judge
from qlora_core.evaluation.pairwise import AnswerPair, Judge, judge_pairs, summarise_verdicts
from qlora_core.evaluation.tournament import rate
from qlora_core.evaluation.verdict import Verdict, write_verdicts
from qlora_core.model.adapter import attach_adapter
from qlora_core.model.base import load_quantized
from qlora_core.model.generate import generate_answers
from qlora_core.model.loss import sequence_losses
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

SPLIT = "test"
BASE = "base"
ADAPTER = "adapter"
BATCHES_PER_ADVANCE = 4
LINEAGE = ("data_digest", "quantized_base_digest", "adapter_digest")


@dataclass(frozen=True)
class _Pair:
    """Base and adapter in one model, with the tokenizer both speak through."""

    model: PeftModel
    chat: ChatTokenizer
    config: EvaluateConfig


def evaluate_adapter(
    config: EvaluateConfig,
    quantized_folder: Path,
    adapter_folder: Path,
    curated_folder: Path,
    out: Path,
    *,
    precision: str = "auto",
    verdict_cache: Path | None = None,
    lineage: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Evaluate the adapter and fill `out`: rows.parquet, answers.jsonl, verdicts.jsonl, ratings.json, evaluation.json.

    `lineage` gives data_digest, quantized_base_digest and adapter_digest to record (null where absent). `environment`
    holds the judge's key and address (None: the process's own). `verdict_cache` None keeps verdicts for this call only.

    Raises EvaluationError where the test split has fewer than two rows, JudgeError where the judge cannot be asked at
    all and ConfigError where its price is unknown: both before the model is loaded, as far as they can be known then.
    """
    environment = os.environ if environment is None else environment
    rows = _test_rows(config, curated_folder)
    prompts = read_prompts(curated_folder, SPLIT, config.max_prompts) if config.max_prompts else []
    kind = resolve_kind(config.judge, environment) if prompts else "none"
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        endpoint: OpenAIJudge | None = None
        if kind == "openai":
            endpoint = stack.enter_context(open_openai_judge(config.judge, environment, verdict_cache))
            endpoint.check()
        pair = _load(config, quantized_folder, adapter_folder, curated_folder, precision)
        metrics: dict[str, Any] = {"heldout": _compare_heldout(pair, rows, out)}
        answers = _answer(pair, prompts)
        metrics["exact_match"] = _compare_exact(pair, prompts, answers, out)
        verdicts = _judge(pair, endpoint, kind, prompts, answers)
        metrics["judge"] = _judge_metrics(config, endpoint, kind, verdicts) if kind != "none" else None
    write_verdicts(out / "verdicts.jsonl", verdicts)
    ratings = rate(verdicts, seed=config.seed, confidence=config.confidence) if any(v.scored for v in verdicts) else {}
    _write_json(out / "ratings.json", ratings)
    evaluation = {
        "metrics": metrics,
        "ratings": ratings.get("ratings", {}),
        **{name: (lineage or {}).get(name) for name in LINEAGE},
    }
    _write_json(out / "evaluation.json", evaluation)
    return evaluation


def heldout_rows(
    config: EvaluateConfig,
    quantized_folder: Path,
    adapter_folder: Path,
    curated_folder: Path,
    *,
    precision: str = "auto",
) -> list[RowLoss]:
    """Losses of any adapter (say, a champion) on the rows `evaluate_adapter` scores, ready for `compare_losses`."""
    rows = _test_rows(config, curated_folder)
    pair = _load(config, quantized_folder, adapter_folder, curated_folder, precision)
    return _losses(pair, rows, ADAPTER)


def read_row_losses(evaluation_folder: Path, model: Literal["base", "adapter"]) -> list[RowLoss]:
    """The losses an evaluation recorded, in its row order. Raises EvaluationError where rows.parquet cannot be read."""
    path = evaluation_folder / "rows.parquet"
    try:
        table = pq.read_table(path, columns=["id", f"{model}_nats", "tokens"])
    except (OSError, pa.ArrowException) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); evaluate again") from error
    return [RowLoss(*values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def _test_rows(config: EvaluateConfig, curated_folder: Path) -> list[TokenRow]:
    # Ids are content hashes, so the first ones by id are a fixed sample of the split
    rows = sorted(read_split(curated_folder, SPLIT), key=lambda row: row.id)[: config.max_rows]
    if len(rows) < 2:
        raise EvaluationError(
            f"the test split has {len(rows)} row(s) and an interval needs 2; give more data or raise the test share"
        )
    return rows


def _load(
    config: EvaluateConfig, quantized_folder: Path, adapter_folder: Path, curated_folder: Path, precision: str
) -> _Pair:
    base = load_quantized(quantized_folder, precision=precision)
    return _Pair(attach_adapter(base, adapter_folder), load_chat_tokenizer(curated_folder / "tokenizer", None), config)


def _losses(pair: _Pair, rows: Sequence[TokenRow], model: str) -> list[RowLoss]:
    piece = pair.config.batch_size * BATCHES_PER_ADVANCE
    losses: list[RowLoss] = []
    with ExitStack() as stack:
        advance = stack.enter_context(progress_bar(f"Scoring {model}", len(rows)))
        if model == BASE:
            stack.enter_context(pair.model.disable_adapter())
        for start in range(0, len(rows), piece):
            part = rows[start : start + piece]
            scored = sequence_losses(pair.model.get_base_model(), part, batch_size=pair.config.batch_size)
            losses += [RowLoss(row.id, nats, tokens) for row, (nats, tokens) in zip(part, scored, strict=True)]
            advance(len(part))
    return losses


def _compare_heldout(pair: _Pair, rows: Sequence[TokenRow], out: Path) -> dict[str, Any]:
    config = pair.config
    base, adapter = _losses(pair, rows, BASE), _losses(pair, rows, ADAPTER)
    table = pa.table(
        {
            "id": [row.id for row in base],
            "tokens": [row.tokens for row in base],
            "base_nats": [row.nats for row in base],
            "adapter_nats": [row.nats for row in adapter],
        }
    )
    pq.write_table(table, out / "rows.parquet")
    return compare_losses(base, adapter, confidence=config.confidence, resamples=config.resamples, seed=config.seed)


def _answer(pair: _Pair, prompts: Sequence[PromptRow]) -> dict[str, list[str]]:
    """Both models' greedy answers, in the prompts' order, by model."""
    if not prompts:
        return {BASE: [], ADAPTER: []}
    settings: dict[str, int] = {
        "max_new_tokens": pair.config.max_new_tokens,
        "batch_size": pair.config.batch_size,
        "stop_token_id": pair.chat.stop_token_id,
    }
    texts = [row.prompt for row in prompts]
    with pair.model.disable_adapter():
        base = generate_answers(pair.model, pair.chat.tokenizer, texts, **settings)
    return {BASE: base, ADAPTER: generate_answers(pair.model, pair.chat.tokenizer, texts, **settings)}


def _compare_exact(
    pair: _Pair, prompts: Sequence[PromptRow], answers: Mapping[str, Sequence[str]], out: Path
) -> dict[str, Any] | None:
    config = pair.config
    hits = {
        model: [
            matches(answer, row.reference, config.exact_match_max_words)
            for answer, row in zip(answers[model], prompts, strict=True)
        ]
        for model in (BASE, ADAPTER)
    }
    with (out / "answers.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
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
    return compare_matches(
        hits[BASE], hits[ADAPTER], confidence=config.confidence, resamples=config.resamples, seed=config.seed
    )


def _judge(
    pair: _Pair,
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
        with pair.model.disable_adapter():
            judge: Judge = LogProbJudge(
                pair.model.get_base_model(), pair.chat.tokenizer, batch_size=pair.config.batch_size
            )
            return judge_pairs(judge, compared, model_a=ADAPTER, model_b=BASE, advance=advance)


def _judge_metrics(
    config: EvaluateConfig, endpoint: OpenAIJudge | None, kind: str, verdicts: Sequence[Verdict]
) -> dict[str, Any]:
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
        "cost_usd": endpoint.cost_usd if endpoint is not None else 0.0,
    }


def question_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What was asked, without template marks: a lone user turn by itself, else all turns with their roles."""
    asked = list(messages[:-1]) if messages and messages[-1]["role"] == "assistant" else list(messages)
    if len(asked) == 1:
        return asked[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in asked)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
