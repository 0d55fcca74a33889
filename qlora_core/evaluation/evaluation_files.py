"""The files of an evaluation's folder: row losses, answers, and another adapter's answers beside them.

Knows their form, not how what is in them was measured.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.dataset import PromptRow
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.heldout import RowLoss

BASE, ADAPTER = "base", "adapter"
ANSWERS_FILE = "answers.jsonl"


def write_row_losses(path: Path, losses: Mapping[str, Sequence[RowLoss]]) -> None:
    """Both systems' nats and tokens of each row as Parquet."""
    base = losses[BASE]
    columns: dict[str, list[Any]] = {"id": [row.id for row in base], "tokens": [row.tokens for row in base]}
    for model in (BASE, ADAPTER):
        columns[f"{model}_nats"] = [row.nats for row in losses[model]]
    pq.write_table(pa.table(columns), path)


def read_row_losses(evaluation_folder: Path, model: Literal["base", "adapter"]) -> list[RowLoss]:
    """The losses an evaluation recorded, in its row order. Raises EvaluationError where rows.parquet cannot be read."""
    path = evaluation_folder / "rows.parquet"
    try:
        table = pq.read_table(path, columns=["id", f"{model}_nats", "tokens"])
    except (OSError, pa.ArrowException) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); evaluate again") from error
    return [RowLoss(*values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def write_answers(
    path: Path,
    prompts: Sequence[PromptRow],
    answers: Mapping[str, Sequence[str]],
    hits: Mapping[str, Sequence[bool | None]],
) -> None:
    """Both systems' answers beside question and reference, with whether each matches (`hits`), as JSON Lines."""
    _write_lines(
        path,
        [
            {
                **_asked(row),
                **{model: answers[model][i] for model in (BASE, ADAPTER)},
                **{f"{model}_matches": hits[model][i] for model in (BASE, ADAPTER)},
            }
            for i, row in enumerate(prompts)
        ],
    )


def write_model_answers(path: Path, prompts: Sequence[PromptRow], model: str, answers: Sequence[str]) -> None:
    """One system's answers under its name, as `answer_book` reads them."""
    rows = zip(prompts, answers, strict=True)
    _write_lines(path, [{**_asked(row), "model": model, "answer": answer} for row, answer in rows])


def read_answers(path: Path, model: str) -> dict[str, str]:
    """A system's answers of an `answers.jsonl` by prompt id. Raises EvaluationError where it cannot be read."""
    try:
        # Only \n ends a row: answers may hold other line separators
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {row["prompt_id"]: row[model] for row in rows}
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); evaluate again") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a document, indented; a number that is not finite is an error."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def question_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What was asked, without template marks: a lone user turn by itself, else all turns with their roles."""
    asked = list(messages[:-1]) if messages and messages[-1]["role"] == "assistant" else list(messages)
    if len(asked) == 1:
        return asked[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in asked)


def _asked(row: PromptRow) -> dict[str, Any]:
    return {
        "prompt_id": row.id,
        "category": row.category,
        "question": question_text(row.messages),
        "reference": row.reference,
    }


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", newline="\n")
