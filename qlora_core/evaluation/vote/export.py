"""Votes for other tools: verdict rows, label rows, all records as JSON Lines and CSV, Label Studio's JSON.

Knows forms of files. Only the owner of a study sees them: they name the models.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qlora_core.evaluation.statistics.agreement import Label
from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.pairs import Pair
from qlora_core.evaluation.vote.quality import preference
from qlora_core.evaluation.vote.records import VoteRecord, counted

HUMAN_PREFIX = "human:"
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")


def verdict_rows(records: Sequence[VoteRecord]) -> list[Verdict]:
    """Verdict rows of the ratings, judge `human:<rater>`; skipped pairs are unscored with the reason "skipped".

    Both bad is a tie with the reason "both_bad". Checks and excluded raters are left out, and so are imported votes
    that do not say which answer was shown first.
    """
    return [
        Verdict(
            prompt_id=row.prompt_id,
            model_a=row.model_a,
            model_b=row.model_b,
            verdict=None if row.label is None else preference(row),  # type: ignore[arg-type]
            first=row.first,
            judge=HUMAN_PREFIX + row.rater,
            reason="skipped" if row.label is None else ("both_bad" if row.label == "both_bad" else None),
        )
        for row in records
        if row.occasion in ("rating", "import") and not row.excluded and row.first is not None
    ]


def label_rows(records: Sequence[VoteRecord]) -> list[Label]:
    """Label rows of the ratings: a, b, tie or both_bad, in terms of each pair's models. Checks are left out."""
    return [Label(item_id=row.item_id, rater_id=row.rater, label=row.label) for row in counted(records)]


def csv_text(records: Sequence[VoteRecord]) -> str:
    """All records as CSV with a header, empty where null. A note that a spreadsheet would run gets an apostrophe."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(VoteRecord.model_fields), lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = record.model_dump()
        if row["note"].startswith(FORMULA_SIGNS):
            row["note"] = "'" + row["note"]
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return stream.getvalue()


def label_studio_tasks(records: Sequence[VoteRecord], pairs: Mapping[str, Pair]) -> list[dict[str, Any]]:
    """Every pair as a Label Studio task with its ratings as annotations (choices named `preference`)."""
    by_item: dict[str, list[VoteRecord]] = defaultdict(list)
    for record in records:
        if record.occasion in ("rating", "import") and not record.excluded:
            by_item[record.item_id].append(record)
    return [
        {
            "id": number,
            "data": {**pair.model_dump(exclude_none=True), "item_id": item},
            "annotations": [_annotation(row) for row in by_item[item]],
        }
        for number, (item, pair) in enumerate(pairs.items(), start=1)
    ]


def export_texts(records: Sequence[VoteRecord], pairs: Mapping[str, Pair]) -> dict[str, Callable[[], str]]:
    """File name -> its text, made when asked for."""
    return {
        "verdicts.jsonl": lambda: _json_lines(verdict_rows(records)),
        "labels.jsonl": lambda: _json_lines(label_rows(records)),
        "votes.jsonl": lambda: _json_lines(records),
        "votes.csv": lambda: csv_text(records),
        "label-studio.json": lambda: (
            json.dumps(label_studio_tasks(records, pairs), ensure_ascii=False, indent=1) + "\n"
        ),
    }


def write_export(folder: Path, records: Sequence[VoteRecord], pairs: Mapping[str, Pair]) -> list[Path]:
    """Write every form into `folder`, replacing what an earlier export left there; gives the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in export_texts(records, pairs).items():
        paths.append(folder / name)
        paths[-1].write_text(text(), encoding="utf-8", newline="\n")
    return paths


def _annotation(row: VoteRecord) -> dict[str, Any]:
    result = {
        "from_name": "preference",
        "to_name": "prompt",
        "type": "choices",
        "value": {"choices": [row.label]},
        "meta": {"first": row.first},
    }
    return {
        "completed_by": {"email": row.rater},
        "was_cancelled": row.label is None,
        "result": [] if row.label is None else [result],
        "created_at": row.at,
        "lead_time": row.seconds,
    }


def _json_lines(rows: Sequence[BaseModel]) -> str:
    return "".join(row.model_dump_json() + "\n" for row in rows)
