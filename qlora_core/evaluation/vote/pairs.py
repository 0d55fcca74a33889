"""What raters compare: two systems' answers to one prompt, from a file of pairs or from an evaluation's answers.

Knows rows and files, not raters or how answers are shown.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.jsonl import read_rows
from qlora_core.evaluation.verdict import Identifier

ANSWERS_FILE = "answers.jsonl"
Preference = Literal["a", "b", "tie"]


class Pair(BaseModel):
    """One item to rate. `gold` is the right preference where it is known: such a pair checks raters.

    Other fields of the row are ignored.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    prompt_id: Identifier
    prompt: str
    model_a: Identifier
    answer_a: str
    model_b: Identifier
    answer_b: str
    gold: Preference | None = None
    category: str | None = None
    item_id: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _compares_two_models(self) -> "Pair":
        if self.model_a == self.model_b:
            raise ValueError(f"model_a and model_b are both {self.model_a!r}; self-pairs are made by the page itself")
        return self


class _EvaluatedAnswer(BaseModel):
    """A row of an evaluation's `answers.jsonl`, as far as it is shown."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prompt_id: Identifier
    question: str
    base: str
    adapter: str
    category: str | None = None


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSON Lines file, or those of an evaluation folder (or its answers.jsonl): adapter against base.

    Every pair gets an `item_id`, unique in the file: its own, else its prompt_id, else prompt_id and both models.
    Raises EvaluationError for bad lines, an empty file, and two rows that ask the same comparison.
    """
    source = path / ANSWERS_FILE if path.is_dir() else path
    if source.name == ANSWERS_FILE or _is_evaluated(source):
        pairs = [_pair_of(row) for row in read_rows(source, _EvaluatedAnswer)]
    else:
        pairs = read_rows(source, Pair)
    if not pairs:
        raise EvaluationError(f"{source} has no rows; give one pair a line: prompt_id, prompt, model_a, answer_a, ...")
    return _with_item_ids(pairs, source)


def named_answers(pairs: Sequence[Pair]) -> int:
    """How many pairs hold a compared model's name (of four letters or more) in a text that raters read."""
    names = {name.casefold() for pair in pairs for name in (pair.model_a, pair.model_b) if len(name) >= 4}
    shown = ["\n".join((pair.prompt, pair.answer_a, pair.answer_b)).casefold() for pair in pairs]
    return sum(any(name in text for name in names) for text in shown)


def _is_evaluated(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            row = json.loads(stream.readline())
    except (OSError, ValueError):
        return False  # read_rows says what is wrong with it
    return isinstance(row, dict) and {"question", "base", "adapter"} <= row.keys()


def _pair_of(row: _EvaluatedAnswer) -> Pair:
    return Pair(
        prompt_id=row.prompt_id,
        prompt=row.question,
        model_a="adapter",
        answer_a=row.adapter,
        model_b="base",
        answer_b=row.base,
        category=row.category,
    )


def _with_item_ids(pairs: Sequence[Pair], source: Path) -> list[Pair]:
    times = Counter(pair.prompt_id for pair in pairs)
    named = [
        pair.model_copy(
            update={
                "item_id": pair.item_id
                or (pair.prompt_id if times[pair.prompt_id] == 1 else "/".join(_comparison(pair)))
            }
        )
        for pair in pairs
    ]
    for what, keys in (
        ("comparison", Counter("/".join(_comparison(pair)) for pair in named)),
        ("item_id", Counter(str(pair.item_id) for pair in named)),
    ):
        key, count = keys.most_common(1)[0]
        if count > 1:
            raise EvaluationError(f"{source}: {count} rows have the {what} {key!r}; keep one row for each")
    return named


def _comparison(pair: Pair) -> tuple[str, ...]:
    return (pair.prompt_id, *sorted((pair.model_a, pair.model_b)))
