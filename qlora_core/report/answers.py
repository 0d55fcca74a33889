"""What an evaluation wrote about single answers, as the report's tables: exact match by category, and samples.

Knows the files of an evaluation folder, nothing of models or HTML.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from qlora_core.errors import EvaluationError

NO_CATEGORY = "no category"
MODELS = ("base", "adapter")


def read_answers(evaluation_folder: Path) -> list[dict[str, Any]]:
    """The rows of `answers.jsonl`; an empty list where the file is empty.

    Raises EvaluationError where it is missing or cannot be read.
    """
    path = evaluation_folder / "answers.jsonl"
    try:
        # Only \n ends a row: answers may hold other line separators
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); evaluate again") from error


def match_table(answers: Sequence[Mapping[str, Any]], confidence: float) -> list[dict[str, Any]]:
    """Exact match by category, by name: {category, prompts, base, adapter}, each model {share, low, high}.

    Intervals are Wilson's. Answers whose reference is not comparable (null) do not count; a category without any
    comparable answer is left out.
    """
    categories: dict[str, list[Mapping[str, Any]]] = {}
    for row in answers:
        if all(row.get(f"{model}_matches") is not None for model in MODELS):
            categories.setdefault(row.get("category") or NO_CATEGORY, []).append(row)
    return [
        {
            "category": category,
            "prompts": len(rows),
            **{model: _share([row[f"{model}_matches"] for row in rows], confidence) for model in MODELS},
        }
        for category, rows in sorted(categories.items())
    ]


def sample_answers(answers: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Up to `count` rows in turn from each category, in the order written, so that a sample shows every kind of task.

    Chosen without a look at who was right.
    """
    queues: dict[str, list[Mapping[str, Any]]] = {}
    for row in answers:
        queues.setdefault(row.get("category") or NO_CATEGORY, []).append(row)
    chosen: list[Mapping[str, Any]] = []
    for turn in range(len(answers)):
        chosen += [queues[category][turn] for category in sorted(queues) if turn < len(queues[category])]
        if len(chosen) >= count:
            break
    return chosen[:count]


def _share(hits: Sequence[bool], confidence: float) -> dict[str, float]:
    interval = binomtest(sum(hits), len(hits)).proportion_ci(confidence, method="wilson")
    return {"share": sum(hits) / len(hits), "low": float(interval.low), "high": float(interval.high)}
