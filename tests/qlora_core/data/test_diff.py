"""The diff of two curated folders, written with the columns it reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.diff import NOT_READ, Change, diff_curated
from qlora_core.data.shards import shard_name
from qlora_core.data.split import SIDES
from qlora_core.errors import DataError

Written = Mapping[str, Any]
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "line": pa.int64(),
        "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        "category": pa.string(),
        "repetition": pa.float64(),
        "truncated": pa.bool_(),
    }
)


def row(row_id: str, prompt: str, source: str = "a.jsonl", **tags: Any) -> Written:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row_id}]
    return {"id": row_id, "source": source, "line": 1, "messages": turns, **tags}


def write(
    folder: Path,
    splits: Mapping[str, Sequence[Written]],
    dropped: Mapping[str, str] | None = None,
    shards: int = 1,
    schema: pa.Schema = SCHEMA,
    **curation: Any,
) -> Path:
    folder.mkdir(parents=True)
    for side in SIDES:
        table = pa.Table.from_pylist(list(splits.get(side, ())), schema)
        for number in range(shards):
            start, end = (n * len(table) // shards for n in (number, number + 1))
            pq.write_table(table.slice(start, end - start), folder / shard_name(side, number, shards))
    ledger = [{"id": row_id, "rule": rule} for row_id, rule in (dropped or {}).items()]
    pq.write_table(
        pa.Table.from_pylist(ledger, pa.schema({"id": pa.string(), "rule": pa.string()})), folder / "dropped.parquet"
    )
    (folder / "curation.json").write_text(json.dumps({"digest": "d", "reasons": {}, **curation}))
    return folder


def test_every_kind_of_change_is_told(tmp_path: Path) -> None:
    a = write(
        tmp_path / "a",
        {
            "train": [
                row("stays", "One?", category="x", repetition=0.5),
                row("moves", "Two?"),
                row("old answer", "Three?", category="x"),
                row("now a leak", "Four?"),
            ],
            "test": [row("gone", "Five?", "b.jsonl")],
        },
        {"was too long": "over_long"},
        digest="one",
        reasons={"over_long": 1},
        config={"max_tokens": 128, "split": {"salt": "s"}},
        chat_template={"origin": "tokenizer"},
    )
    b = write(
        tmp_path / "b",
        {
            "train": [
                row("stays", "One?", category="y", repetition=0.5),
                row("new answer", "three", category="x"),
                row("was too long", "Six?"),
                row("other answer", "THREE?"),
            ],
            "validation": [row("moves", "Two?")],
            "test": [row("new", "Seven?", "c.jsonl")],
        },
        {"now a leak": "leak"},
        digest="two",
        reasons={"leak": 1},
        config={"max_tokens": 256, "split": {"salt": "s"}},
        chat_template={"origin": "chat.jinja"},
    )

    diff = diff_curated(a, b)

    assert not diff.same
    assert diff.rows == Change(5, 6)
    assert diff.splits == {"train": Change(4, 4), "validation": Change(0, 1), "test": Change(1, 1)}
    assert diff.sources == {"a.jsonl": Change(4, 5), "b.jsonl": Change(1, 0), "c.jsonl": Change(0, 1)}
    assert (diff.added.rows, diff.added.ids) == (4, ("new", "new answer", "other answer", "was too long"))
    assert (diff.removed.rows, diff.removed.ids) == (3, ("gone", "now a leak", "old answer"))
    assert diff.added_from == {NOT_READ: 3, "over_long": 1}
    assert diff.removed_to == {NOT_READ: 2, "leak": 1}
    assert {way: change.ids for way, change in diff.moved.items()} == {"train -> validation": ("moves",)}
    # Two rows answer the prompt whose one answer is gone.
    assert diff.changed_answers.ids == ("new answer",)
    assert {name: change.ids for name, change in diff.changed_tags.items()} == {"category": ("stays",)}
    assert diff.drop_rules == {"over_long": Change(1, 0), "leak": Change(0, 1)}
    assert diff.settings == {
        "config.max_tokens": Change(128, 256),
        "chat_template.origin": Change("tokenizer", "chat.jinja"),
    }
    text = diff.text()
    for line in (
        "different content: digest one -> two",
        "source b.jsonl: 1 -> 0",
        f"added: 4 (before: {NOT_READ} 3, over_long 1), e.g. new",
        "moved train -> validation: 1",
        "dropped by leak: 0 -> 1",
        "setting config.max_tokens: 128 -> 256",
    ):
        assert line in text
    assert json.loads(json.dumps(diff.to_json()))["moved"]["train -> validation"]["rows"] == 1


def test_settings_are_what_was_chosen_and_figures_single_measured_values(tmp_path: Path) -> None:
    def curation(bins: int, allow: list[str]) -> dict[str, Any]:
        return {
            "config": {"tags": {"allow": allow, "order": allow[:2]}, "split": {"salt": "s"}},
            "max_tokens": bins,
            "lengths": {"rows": bins, "mean": None, "histogram": [{"from": n, "rows": bins} for n in range(bins)]},
            "near_duplicates": {"verified": bins, "largest": [{"members": [f"id{n}" for n in range(bins)]}]},
            "licences": {"a.jsonl": {"mit": bins}} if bins > 50 else {},
            "tokens": {"total": 7},
        }

    a = write(tmp_path / "a", {}, **curation(50, ["x", "y"]))
    b = write(tmp_path / "b", {}, **curation(60, ["y", "x", *(f"word{n}" for n in range(100))]))

    diff = diff_curated(a, b)

    assert diff.settings == {
        "config.tags.allow": Change([], ["word0", "word1", "word2", "word3", "word4", "and 95 more"]),
        "config.tags.order": Change(["x", "y"], ["y", "x"]),
        "max_tokens": Change(50, 60),
    }
    assert diff.figures == {
        "lengths.rows": Change(50, 60),
        "near_duplicates.verified": Change(50, 60),
        "licences.a.jsonl.mit": Change(None, 60),
    }
    assert "figure near_duplicates.verified: 50 -> 60" in diff.text()
    assert max(map(len, diff.text().splitlines())) < 200
    assert len(json.dumps(diff.to_json())) < 2000


def test_equal_rows_in_other_shards_are_the_same(tmp_path: Path) -> None:
    rows = [
        row(f"row {n}", f"{n}?", repetition=None if n % 2 else float("nan"), truncated=n % 3 == 0) for n in range(9)
    ]
    diff = diff_curated(write(tmp_path / "a", {"train": rows}), write(tmp_path / "b", {"train": rows[::-1]}, shards=3))

    assert diff.same
    assert diff.rows == Change(9, 9)
    assert (diff.added.rows, diff.removed.rows, diff.moved, diff.changed_tags) == (0, 0, {}, {})
    assert diff.text().splitlines()[0] == "the same content: digest d -> d"
    assert "moved between splits: 0" in diff.text()


def test_column_of_one_set_alone_is_named_and_a_changed_type_compared(tmp_path: Path) -> None:
    other = pa.schema(
        [*(f for f in SCHEMA if f.name not in ("category", "truncated")), pa.field("truncated", pa.int8())]
    )
    a = write(tmp_path / "a", {"train": [row("r", "?", truncated=True), row("s", "?", truncated=False)]})
    b = write(tmp_path / "b", {"train": [row("r", "?", truncated=1), row("s", "?", truncated=1)]}, schema=other)

    diff = diff_curated(a, b)

    assert diff.columns == Change(["category"], [])
    assert diff.changed_tags["truncated"].ids == ("s",)


def test_empty_sets_differ_in_nothing(tmp_path: Path) -> None:
    diff = diff_curated(write(tmp_path / "a", {}), write(tmp_path / "b", {}))

    assert diff.rows == Change(0, 0)
    assert diff.changed_answers.rows == 0


def test_what_is_no_curated_set_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good", {})
    with pytest.raises(DataError, match=r"missing.*is no curated set.*qlora curate"):
        diff_curated(good, tmp_path / "missing")
    (good / shard_name("test", 0, 1)).write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"test-00000.*is no split"):
        diff_curated(good, good)
    (good / shard_name("test", 0, 1)).unlink()
    with pytest.raises(DataError, match="no such file"):
        diff_curated(good, good)
    pq.write_table(pa.table({"id": ["r"]}), good / shard_name("test", 0, 1))
    with pytest.raises(DataError, match="has no column source; it has id"):
        diff_curated(good, good)
    (good / "curation.json").write_text("[]")
    with pytest.raises(DataError, match="holds no JSON object"):
        diff_curated(good, good)


PLACED = st.dictionaries(st.integers(0, 12), st.sampled_from(SIDES), max_size=10)


@settings(max_examples=25, deadline=None)
@given(before=PLACED, after=PLACED)
def test_counts_are_those_of_sets(
    before: dict[int, str], after: dict[int, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("diff")
    a, b = (
        write(
            folder / name,
            {side: [row(f"r{n}", f"p{n % 4}") for n, at in placed.items() if at == side] for side in SIDES},
        )
        for name, placed in (("a", before), ("b", after))
    )

    diff = diff_curated(a, b)

    assert diff.added.rows == len(after.keys() - before.keys())
    assert diff.removed.rows == len(before.keys() - after.keys())
    moved = [n for n in before.keys() & after.keys() if before[n] != after[n]]
    assert sum(change.rows for change in diff.moved.values()) == len(moved)
    prompts = [[n % 4 for n in one.keys() - other.keys()] for one, other in ((before, after), (after, before))]
    assert diff.changed_answers.rows == sum(min(prompts[0].count(p), prompts[1].count(p)) for p in range(4))
