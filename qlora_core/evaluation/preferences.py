"""Preference pairs from a judge's verdicts on the model's own answers, for a round of DPO that is gated like any other.

After Self-Rewarding Language Models (Yuan et al. 2024): the model answers prompts it may train on, a judge says which
of two answers is better, and the pairs it is sure of are learned from. Only training prompts are answered: a pair from
the test split would be the gate's own questions. Knows nothing of training.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.data.dataset import PromptRow, read_prompts
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.adapter_scores import open_scorer
from qlora_core.evaluation.answer_book import Prompt
from qlora_core.evaluation.answer_checks import is_degenerate
from qlora_core.evaluation.evaluation_files import question_text
from qlora_core.evaluation.judge.choice import open_judge
from qlora_core.evaluation.judge.client import resolve_kind
from qlora_core.evaluation.judge.offline import LogProbJudge
from qlora_core.evaluation.pairwise import AnswerPair, judge_pairs
from qlora_core.evaluation.verdict import Verdict
from qlora_core.model.adapter_set import NamedAdapter
from qlora_core.progress import progress_bar

SPLIT = "train"
ADAPTER, OTHER = "adapter", "other"


class PreferenceSet(NamedTuple):
    """`rows` for a data source ({prompt, chosen, rejected, ...}), and why other prompts gave none, by reason."""

    rows: list[dict[str, Any]]
    left_out: dict[str, int]


def collect_preferences(
    config: EvaluateConfig,
    quantized_folder: Path,
    adapter_folder: Path,
    curated_folder: Path,
    *,
    prompts: int,
    other_folder: Path | None = None,
    allow_uncertified: bool = False,
    precision: str = "auto",
    residency: Mapping[str, Any] | None = None,
) -> PreferenceSet:
    """Answer the first `prompts` of the training split with the adapter and another system, and keep what is decided.

    `other_folder` is a second adapter (the champion); None means the base. Raises EvaluationError without a judge, and
    for one that is not certified unless `allow_uncertified`: what it prefers would be trained into the model.
    """
    kind = resolve_kind(config.judge, os.environ)
    if kind == "none":
        raise EvaluationError("evaluate.judge.kind is none, and pairs come from a judge's verdicts; set another kind")
    asked = read_prompts(curated_folder, SPLIT, prompts)
    named = [NamedAdapter(ADAPTER, adapter_folder)]
    if other_folder is not None:
        named.append(NamedAdapter(OTHER, other_folder))
    questions = {row.id: Prompt(question_text(row.messages), row.category, row.reference) for row in asked}
    with ExitStack() as opened:
        chosen = opened.enter_context(open_judge(config, kind, os.environ, None, questions))
        if not (allow_uncertified or chosen.certified):
            raise EvaluationError(
                f"the judge ({kind}) is not certified, and what it prefers would be trained in; see `qlora judge "
                "certify`, or allow it (--uncertified)"
            )
        scorer = opened.enter_context(
            open_scorer(config, quantized_folder, named, curated_folder, precision, residency)
        )
        mine, others = scorer.answers(asked, (ADAPTER, None if other_folder is None else OTHER))
        compared = [
            AnswerPair(row.id, question_text(row.messages), by_adapter, by_other, row.reference)
            for row, by_adapter, by_other in zip(asked, mine, others, strict=True)
        ]
        judge = chosen.judge(
            lambda: LogProbJudge(scorer.adapters.base, scorer.chat.tokenizer, batch_size=scorer.config.batch_size)
        )
        with progress_bar("Judging", 2 * len(compared)) as advance:
            verdicts = judge_pairs(judge, compared, model_a=ADAPTER, model_b=OTHER, advance=advance)
    return choose_pairs(asked, compared, verdicts)


def choose_pairs(
    asked: Sequence[PromptRow], compared: Sequence[AnswerPair], verdicts: Iterable[Verdict]
) -> PreferenceSet:
    """A row for each prompt that both orders decide alike, unless the better answer is degenerate itself.

    Reasons of the rest: unscored, tie, orders disagree, degenerate.
    """
    said: dict[str, list[str | None]] = {}
    for verdict in verdicts:
        said.setdefault(verdict.prompt_id, []).append(verdict.verdict)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for row, pair in zip(asked, compared, strict=True):
        found = set(said.get(row.id, [None]))
        better, worse = (pair.answer_a, pair.answer_b) if found == {"a"} else (pair.answer_b, pair.answer_a)
        reason = _reason(found) or ("degenerate" if is_degenerate(better, pair.question) else None)
        if reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        opening = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
        answer = {"chosen": better, "rejected": worse}
        turns = {side: [{"role": "assistant", "content": text}] for side, text in answer.items()}
        rows.append({"prompt": [dict(turn) for turn in opening], **turns, "category": row.category})
    return PreferenceSet(rows, left_out)


def write_preferences(path: Path, found: PreferenceSet) -> None:
    """The rows as JSON Lines, which `data.sources` reads. Raises EvaluationError where there is none to write."""
    if not found.rows:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(found.left_out.items()))
        raise EvaluationError(f"no pair was decided ({told or 'no prompts'}); ask more prompts, or another judge")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
    path.write_text(lines, encoding="utf-8", newline="\n")


def _reason(found: set[str | None]) -> str | None:
    if None in found:
        return "unscored"
    if "tie" in found:
        return "tie"
    return "orders disagree" if len(found) > 1 else None
