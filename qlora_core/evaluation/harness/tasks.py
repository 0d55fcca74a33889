"""Local tasks for the harness from files of questions with lettered options, MMLU's published form among them.

Knows the files and the harness's task description, nothing of models. No download: rows are copied beside the task.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from qlora_core.errors import DataError

NAME = re.compile(r"[a-z0-9_]+")
OPTION = re.compile(r"^([A-Z])\. ", re.MULTILINE)
CATEGORY = "subject"


def write_choice_task(name: str, source: Path, folder: Path) -> str:
    """Make the task `name` in `folder` from `source`, and give its name.

    `source` holds one JSON object per line: `input` (the question with its options on lines "A. ...", ending where the
    answer goes), `output` (the right letter) and, if it has categories, `subject`. Every letter that some row offers is
    scored for the rows that offer it. Raises DataError for a name or row that does not fit, naming the line.
    """
    if not NAME.fullmatch(name):
        raise DataError(f"task name {name!r} does not fit; use lower-case letters, digits and underscores")
    rows = [_row(line, f"{source}, line {number}") for number, line in _lines(source)]
    if not rows:
        raise DataError(f"{source} has no row; give questions as JSON lines of input and output")
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{input}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return name


def _lines(source: Path) -> list[tuple[int, str]]:
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read ({error}); name a UTF-8 file of JSON lines") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        question, answer = row["input"], row["output"].strip()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not an object with input and output ({error})") from error
    choices = _options(question)
    if answer not in choices:
        raise DataError(f"{where}: the answer {answer!r:.40} is none of the options {', '.join(choices) or '(none)'}")
    return {
        "input": question.rstrip(),
        "choices": choices,
        "answer": choices.index(answer),
        CATEGORY: str(row.get(CATEGORY) or "all"),
    }


def _options(question: str) -> list[str]:
    """The letters of the options: A, B, ... in their order, from the last "A. " on. A numbered "I. " is none."""
    found = OPTION.findall(question)
    letters: list[str] = []
    for letter in found[len(found) - found[::-1].index("A") - 1 :] if "A" in found else []:
        if letter == chr(ord("A") + len(letters)):
            letters.append(letter)
    return letters
