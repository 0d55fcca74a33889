"""Several systems' answers to the same prompts, from files of any origin or from evaluations.

Knows rows and files, not how answers are judged or shown.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.jsonl import read_rows
from qlora_core.evaluation.verdict import Identifier
from qlora_core.evaluation.vote.pairs import ANSWERS_FILE, read_pairs

CANDIDATES_FILE = "candidate_answers.jsonl"
BASE, ADAPTER = "base", "adapter"


class Prompt(NamedTuple):
    """What was asked, what it is filed under, and a right answer where one is known."""

    question: str
    category: str | None = None
    reference: str | None = None


@dataclass
class AnswerBook:
    """`prompts` by id, and `answers` by model and prompt id. A model need not have answered every prompt."""

    prompts: dict[str, Prompt] = field(default_factory=dict)
    answers: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def common(self) -> list[str]:
        """The prompts that every model answered, by id; empty without models."""
        answered = [set(found) for found in self.answers.values()]
        return sorted(set.intersection(*answered)) if answered else []

    def add(self, model: str, prompt_id: str, prompt: Prompt, answer: str) -> None:
        """Enter an answer. Raises EvaluationError where this prompt or answer stands there with another text."""
        known = self.prompts.setdefault(prompt_id, prompt)
        if known.question != prompt.question:
            raise EvaluationError(
                f"prompt {prompt_id!r} has two texts ({known.question[:60]!r} and {prompt.question[:60]!r}); give each "
                "prompt its own id"
            )
        filed = Prompt(known.question, known.category or prompt.category, known.reference or prompt.reference)
        self.prompts[prompt_id] = filed
        if self.answers.setdefault(model, {}).setdefault(prompt_id, answer) != answer:
            raise EvaluationError(f"{model!r} has two answers to prompt {prompt_id!r}; keep one, or rename one model")


class AnswerRow(BaseModel):
    """One answer. `model` may be left out where the file is named as one model's; other fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    prompt_id: Identifier
    question: str = Field(validation_alias=AliasChoices("question", "prompt"))
    answer: str
    model: Identifier | None = None
    category: str | None = None
    reference: str | None = None


class _CandidateRow(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    prompt_id: Identifier
    trial: str
    answer: str


def read_answer_book(sources: Sequence[str]) -> AnswerBook:
    """The answers of all sources, each `PATH` or `NAME=PATH`.

    PATH is an evaluation's folder (base, adapter, and a sweep's other candidates by trial; under a NAME its adapter
    alone), a file of pairs as `qlora vote serve` takes, or a file of answers: {"prompt_id", "question" or "prompt",
    "answer", "model", "category"?, "reference"?}, where a NAME stands for `model`.

    Raises EvaluationError for bad rows, answers without a model, and prompts or answers with two texts.
    """
    book = AnswerBook()
    for source in sources:
        name, path = _split(source)
        if path.is_dir():
            _add_evaluation(book, path, name)
        elif "answer" in _first_row(path):
            _add_answers(book, path, name)
        elif name is not None:
            raise EvaluationError(f"{path} holds pairs of models' answers and has their names; leave out {name}=")
        else:
            _add_pairs(book, path)
    return book


def _split(source: str) -> tuple[str | None, Path]:
    name, equals, path = source.partition("=")
    # A path that is there wins, whatever signs its name has
    if not equals or Path(source).exists():
        return None, Path(source)
    if not name or not path:
        raise EvaluationError(f"{source!r} is no NAME=PATH; give e.g. champion=answers.jsonl")
    return name, Path(path)


def _first_row(path: Path) -> dict[str, object]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            row = json.loads(next((line for line in stream if line.strip()), "{}"))
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror}); name a file or folder of answers") from error
    except ValueError:
        return {}  # the reader of its rows says what is wrong, line by line
    return row if isinstance(row, dict) else {}


def _add_answers(book: AnswerBook, path: Path, name: str | None) -> None:
    for row in read_rows(path, AnswerRow):
        model = name or row.model
        if model is None:
            raise EvaluationError(f"{path}: the answer to {row.prompt_id!r} names no model; give NAME={path}")
        book.add(model, row.prompt_id, Prompt(row.question, row.category, row.reference), row.answer)


def _add_pairs(book: AnswerBook, path: Path) -> None:
    for pair in read_pairs(path):
        prompt = Prompt(pair.prompt, pair.category)
        book.add(pair.model_a, pair.prompt_id, prompt, pair.answer_a)
        book.add(pair.model_b, pair.prompt_id, prompt, pair.answer_b)


def _add_evaluation(book: AnswerBook, folder: Path, name: str | None) -> None:
    prompts: dict[str, Prompt] = {}
    for row in _evaluated(folder):
        prompt = prompts[str(row["prompt_id"])] = Prompt(row["question"], row.get("category"), row.get("reference"))
        book.add(name or ADAPTER, row["prompt_id"], prompt, row[ADAPTER])
        if name is None:
            book.add(BASE, row["prompt_id"], prompt, row[BASE])
    others = folder / CANDIDATES_FILE
    if name is not None or not others.is_file():
        return
    rows = read_rows(others, _CandidateRow)
    for candidate in rows:
        # The first trial of the file is the adapter itself
        if candidate.trial != rows[0].trial:
            book.add(candidate.trial, candidate.prompt_id, prompts[candidate.prompt_id], candidate.answer)


def _evaluated(folder: Path) -> Iterator[dict[str, str]]:
    path = folder / ANSWERS_FILE
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        yield from ({**row, "question": row["question"], BASE: row[BASE], ADAPTER: row[ADAPTER]} for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} is no evaluation's answers ({error!r}); name a folder of one") from error
