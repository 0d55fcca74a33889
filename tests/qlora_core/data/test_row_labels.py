"""What a record says about itself beside its conversation: licence, generator, language, tools, groups."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_core.config.curation import ReadersConfig
from qlora_core.data.reading import SourceReading, read_source
from qlora_core.data.source_files import SourceFile

WriteJsonl = Callable[..., Path]
QA = {"prompt": "a", "response": "b"}


def read(path: Path) -> SourceReading:
    return read_source(SourceFile(path.name, path), ReadersConfig())


def test_labels_are_kept_under_their_usual_names(write_jsonl: WriteJsonl) -> None:
    labels = {
        "license": " CC-BY ",
        "model": "m-7b",
        "lang": "sw",
        "category": 3,
        "group_keys": ["story:1", 7, "story:1"],
    }

    [row] = read(write_jsonl([{**QA, **labels}])).rows

    assert (row.licence, row.generator, row.language, row.category) == ("CC-BY", "m-7b", "sw", "3")
    assert row.group_keys == ("story:1", "7")


def test_tools_are_canonical_json_however_they_are_given(write_jsonl: WriteJsonl) -> None:
    tools = [{"name": "search", "parameters": {"b": 1, "a": 2}}]
    records = [
        {**QA, "tools": tools},
        {**QA, "tools": json.dumps(tools)},
        {**QA, "functions": tools},
        {**QA, "tools": []},
    ]

    found = [row.tools for row in read(write_jsonl(records)).rows]

    assert found == ['[{"name":"search","parameters":{"a":2,"b":1}}]'] * 3 + [None]


BAD_LABELS = [
    ("wrong type", {"license": ["MIT"]}),
    ("wrong type", {"group_keys": [{"a": 1}]}),
    ("wrong type", {"tools": 5}),
    ("not JSON", {"tools": "search(query)"}),
    ("wrong type", {"tools": [float("nan")]}),
    ("invalid text", {"category": "a\0"}),
    ("invalid text", {"group_keys": ["\ud800"]}),
]


@pytest.mark.parametrize(("kind", "labels"), BAD_LABELS)
def test_label_that_cannot_be_read_sets_the_row_aside(kind: str, labels: Mapping, write_jsonl: WriteJsonl) -> None:
    lines = [json.dumps(QA), json.dumps({**QA, **labels})]

    reading = read(write_jsonl(lines))

    assert (len(reading.rows), [entry.kind for entry in reading.quarantined]) == (1, [kind])


def test_sharegpt_turns_may_have_weights(write_jsonl: WriteJsonl) -> None:
    turns = [("human", "a"), ("bing", "b"), ("human", "c"), ("gpt", "d")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    record["conversations"][1]["weight"] = 0  # type: ignore[assignment]

    [row] = read(write_jsonl([record])).rows

    assert [message.train for message in row.messages] == [False, False, False, True]


def test_parquet_with_messages_equals_json_lines(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "license": "MIT"},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "license": None},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")

    table, lines = read(tmp_path / "rows.parquet"), read(write_jsonl(records))

    assert [(row.id, row.licence) for row in table.rows] == [(row.id, row.licence) for row in lines.rows]
    assert table.format == "messages"


def test_parquet_column_of_a_wrong_type_sets_its_rows_aside(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [1, 2], "response": ["a", "b"]}), tmp_path / "rows.parquet")

    reading = read(tmp_path / "rows.parquet")

    assert [(entry.line, entry.kind) for entry in reading.quarantined] == [(1, "wrong type"), (2, "wrong type")]
