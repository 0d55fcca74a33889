"""Votes cast elsewhere: JSON Lines (votes, verdict rows, label rows), CSV with the same fields, Label Studio's JSON.

Knows forms of files and matches their rows with a study's items; does not guess what a row leaves open.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qlora_core.digest import digest_json
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.jsonl import read_rows
from qlora_core.evaluation.verdict import Identifier
from qlora_core.evaluation.vote.export import HUMAN_PREFIX
from qlora_core.evaluation.vote.links import RATER_NAME
from qlora_core.evaluation.vote.pairs import Pair
from qlora_core.evaluation.vote.state import ImportedVote, LabelName, Side

SHOWN = 5
SIDE_NAMES = {"left": "a", "right": "b"}
OTHER: dict[str, Any] = {"a": "b", "b": "a"}


class ForeignVote(BaseModel):
    """A vote in any of the forms. The rater is `rater`, `rater_id` or `judge`; the label `label` or `verdict`."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    rater: str = Field(pattern=RATER_NAME.pattern)
    label: LabelName | None
    item_id: Identifier | None = None
    prompt_id: Identifier | None = None
    model_a: str | None = None
    model_b: str | None = None
    first: Side | None = None
    occasion: str = "rating"
    excluded: bool = False
    at: datetime | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_any_form(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        row = {name: value for name, value in data.items() if value != "" and (value is not None or name == "label")}
        rater = row.get("rater") or row.get("rater_id") or row.get("judge")
        if isinstance(rater, str):
            row["rater"] = rater.removeprefix(HUMAN_PREFIX)
        if "verdict" in data and "label" not in row:
            row["label"] = "both_bad" if row.get("reason") == "both_bad" else data["verdict"] or None
        if "label" in data:
            row["label"] = data["label"] or None
        return row


class ImportPlan(NamedTuple):
    """Votes to add, each with the key that makes a second import of it change nothing; and how many rows were none."""

    votes: list[tuple[str, ImportedVote]]
    skipped: int


def read_votes(path: Path, pairs: Mapping[str, Pair]) -> ImportPlan:
    """The votes of a file on a study's items. Skipped, excluded and check rows are counted, not taken.

    Raises EvaluationError for rows of no known form and for items the study does not have.
    """
    rows = _read(path)
    by_comparison = {_comparison(pair.prompt_id, pair.model_a, pair.model_b): item for item, pair in pairs.items()}
    votes, unknown = [], []
    for row in rows:
        if row.label is None or row.excluded or row.occasion not in ("rating", "import"):
            continue
        item = _item_of(row, pairs, by_comparison)
        if item is None:
            unknown.append(row.item_id or f"{row.prompt_id} ({row.model_a} and {row.model_b})")
            continue
        vote = _in_terms_of(pairs[item], item, row)
        votes.append((f"import-{digest_json(vote._asdict())}", vote))
    if unknown:
        shown = ", ".join(unknown[:SHOWN])
        raise EvaluationError(
            f"{path}: {len(unknown)} vote(s) are on items this study does not have, such as {shown}; "
            "import them into the study that shows these pairs"
        )
    return ImportPlan(votes, len(rows) - len(votes))


def _read(path: Path) -> Sequence[ForeignVote]:
    if path.suffix.casefold() == ".csv":
        with _open(path) as stream:
            return _validated(path, list(csv.DictReader(stream)))
    with _open(path) as stream:
        start = stream.read(1)
    if start != "[":
        return read_rows(path, ForeignVote)
    try:
        return _validated(path, _label_studio_rows(json.loads(path.read_text(encoding="utf-8-sig"))))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"{path} is not Label Studio's JSON export ({error!r}); export it as JSON") from error


def _open(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror}); name a file of votes") from error


def _validated(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[ForeignVote]:
    votes, faults = [], []
    for number, row in enumerate(rows, start=1):
        try:
            votes.append(ForeignVote.model_validate(dict(row)))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            faults.append(f"vote {number}: {'.'.join(map(str, fault['loc'])) or 'row'}: {fault['msg']}")
    if faults:
        raise EvaluationError(f"{path}: {len(faults)} bad vote(s); mend them:\n  " + "\n  ".join(faults[:SHOWN]))
    return votes


def _label_studio_rows(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for task in tasks:
        for annotation in task.get("annotations", []):
            by = annotation["completed_by"]
            results = [result for result in annotation["result"] if result["type"] in ("choices", "pairwise")]
            result = None if annotation.get("was_cancelled") or not results else results[0]
            label = first = None
            if result is not None:
                value = result["value"]
                label = value["choices"][0] if result["type"] == "choices" else SIDE_NAMES[value["selected"]]
                # the labelling interface of docs/voting.md has answer_a on the left
                first = result["meta"]["first"] if "first" in result.get("meta", {}) else "a"
            rows.append(
                {
                    **{name: task["data"].get(name) for name in ("item_id", "prompt_id", "model_a", "model_b")},
                    "rater": str(by.get("email") or by["id"]) if isinstance(by, dict) else str(by),
                    "label": label,
                    "first": first,
                    "at": annotation.get("created_at"),
                }
            )
    return rows


def _item_of(row: ForeignVote, pairs: Mapping[str, Pair], by_comparison: Mapping[tuple[str, ...], str]) -> str | None:
    if row.prompt_id is not None and row.model_a is not None and row.model_b is not None:
        return by_comparison.get(_comparison(row.prompt_id, row.model_a, row.model_b))
    return row.item_id if row.item_id in pairs else None


def _in_terms_of(pair: Pair, item: str, row: ForeignVote) -> ImportedVote:
    """The vote with a and b as in the study, whose pair may name the two models the other way round."""
    at = None if row.at is None else row.at.timestamp()
    label, first = row.label, row.first
    assert label is not None
    if row.model_a is not None and row.model_a != pair.model_a:
        label, first = OTHER.get(label, label), OTHER.get(first or "")
    return ImportedVote(at, row.rater, item, label, first)


def _comparison(prompt_id: str, model_a: str, model_b: str) -> tuple[str, ...]:
    return (prompt_id, *sorted((model_a, model_b)))
