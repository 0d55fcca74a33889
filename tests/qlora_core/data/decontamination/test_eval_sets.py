"""Evaluation sets of every known shape, recognised by content; what cannot be read is refused with its place."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_core.data.decontamination.eval_sets import EvalItem, read_eval_sets
from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError


def read(path: Path) -> tuple[EvalItem, ...]:
    (found,) = read_eval_sets([SourceFile(path.name, path)])
    assert found.name == path.name
    return found.items


def read_one(tmp_path: Path, record: Any) -> EvalItem:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (item,) = read(path)
    return item


@pytest.mark.parametrize(
    ("record", "prompts", "stem", "reference"),
    [
        ({"question": "Two and two?", "answer": "It is 4.\n#### 4"}, ["Two and two?"], None, "It is 4.\n#### 4"),
        ({"question_id": 1, "text": "Why?", "category": "x"}, ["Why?"], None, None),
        ({"uid": "u", "cluster": "c", "prompt": "Write a tune."}, ["Write a tune."], None, None),
        ({"question_id": 81, "turns": ["One?", "Two?"], "reference": ["a", "b"]}, ["One?", "Two?"], None, "a\nb"),
        ({"turns": [{"content": "One?"}]}, ["One?"], None, None),
        ({"instruction": "Sum up.", "input": "A text.", "output": "T."}, ["Sum up.\n\nA text."], None, "T."),
        ({"instruction": "Say hello.", "input": "", "output": "Hello."}, ["Say hello."], None, "Hello."),
        ({"task_id": "HE/0", "prompt": "def f():\n", "canonical_solution": " 1"}, ["def f():"], None, "1"),
        ({"problem": "Find x.", "solution": "2"}, ["Find x."], None, "2"),
        ({"inputs": "Translate.", "targets": "x"}, ["Translate."], None, "x"),
        ("Only a prompt", ["Only a prompt"], None, None),
        (
            {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi?"},
                          {"role": "assistant", "content": "Yes"}, {"role": "user", "content": [{"text": "And?"}]}]},
            ["Hi?", "And?"], None, None,
        ),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes"}]}, ["Hi?"], None, None),
        (
            {"question": "Which?", "choices": ["red", "blue"], "answer": 1},
            ["Which?\nA. red\nB. blue"], "Which?", "blue",
        ),
        (
            {"question": "Which?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"},
            ["Which?\n1. red\n2. blue"], "Which?", "2",
        ),
        (
            {"question": {"stem": "Which?", "choices": [{"text": "red", "label": "a"}, {"text": "blue"}]}},
            ["Which?\na. red\nB. blue"], "Which?", None,
        ),
        ({"question": "Which?", "A": "red", "B": "blue", "answer": "A"}, ["Which?\nA. red\nB. blue"], "Which?", "A"),
        (
            {"input": "Header.\n\nWhich?\nA. red\nB. blue\nAnswer:", "output": "A"},
            ["Header.\n\nWhich?\nA. red\nB. blue\nAnswer:"], "Header.\n\nWhich?", "A",
        ),
    ],
)  # fmt: skip
def test_prompts_stem_and_reference(
    record: Any, prompts: list[str], stem: str | None, reference: str | None, tmp_path: Path
) -> None:
    item = read_one(tmp_path, record)
    assert item == EvalItem("items.jsonl/1", 1, tuple(prompts), stem, reference)


ROWS = [
    {"Type": "x", "Question": "Who, if any?", "Best Answer": "None"},
    {"Type": "y", "Question": "Why\nnot?", "Best Answer": "So"},
]


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_array, write_gzip])
def test_every_container_gives_the_same_items(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "some-set"
    write(path)
    items = read(path)
    assert [(item.prompts, item.reference) for item in items] == [(("Who, if any?",), "None"), (("Why\nnot?",), "So")]
    assert all(item.id == f"some-set/{item.line}" for item in items)


def test_a_record_without_a_prompt_is_refused_with_file_line_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "Fine?"}\n{"title": "x", "body": "y"}\n')
    with pytest.raises(DataError, match=r"odd\.jsonl, line 2: no prompt found.*'title', 'body'.*question"):
        read(path)


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", "17", '{"question": ""}', '{"turns": []}'])
def test_a_broken_record_is_refused_not_passed_over(line: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "Fine?"}\n' * 3 + line + "\n")
    with pytest.raises(DataError, match=r"odd\.jsonl, line 4"):
        read(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"none\.jsonl is empty"):
        read(path)
