"""The Parquet files of a curated set: shards, columns, and bytes that depend on the rows alone."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_core.data.ledger import Dropped
from qlora_core.data.loss_mask import MaskedRow, TrainedTurn
from qlora_core.data.row import Message, Row
from qlora_core.data.tables import ROW_SCHEMA, SplitWriter, row_columns, write_dropped
from qlora_core.errors import DataError


def masked(number: int) -> MaskedRow:
    messages = (
        Message("user", f"question {number}"),
        Message("assistant", "not trained"),
        Message("user", "and?"),
        Message("assistant", f"answer {number}", train=True),
    )
    row = Row(
        f"{number:064x}", messages, "a.jsonl", number, category="c", licence="MIT", generator="human", language="en",
        tools="[]", rejected="worse", group_keys=("tree", "story") if number % 2 else (),
    )  # fmt: skip
    ids = list(range(number % 50 + 4))
    return MaskedRow(row, ids, [False, False, *[True] * (len(ids) - 2)], (TrainedTurn(3, "the prompt", 2, 3),))


def write(
    folder: Path, rows: Sequence[MaskedRow], shard_rows: int, batch: int, tags: dict[str, pa.Array] | None = None
) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    tags = tags or {}
    with SplitWriter(folder, "train", len(rows), shard_rows, {name: c.type for name, c in tags.items()}) as writer:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            writer.write(row_columns(part), {name: column.slice(start, len(part)) for name, column in tags.items()})
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_column_holds_what_the_row_says(tmp_path: Path) -> None:
    rows = [masked(n) for n in (1, 2)]
    write(tmp_path, rows, 10, 10, {"tox": pa.array([0.5, None]), "refusal": pa.array([True, False])})

    table = pq.read_table(tmp_path / "train-00000-of-00001.parquet")
    [first, second] = table.to_pylist()

    assert table.schema.names == [*ROW_SCHEMA.names, "tag_tox", "tag_refusal"]
    assert first == {
        "id": f"{1:064x}", "source": "a.jsonl", "line": 1, "category": "c",
        "messages": [{"role": m.role, "content": m.content} for m in rows[0].row.messages],
        "train": [False, False, False, True], "prompt": "the prompt", "reference": "answer 1", "rejected": "worse",
        "tools": "[]", "input_ids": [0, 1, 2, 3, 4], "loss_mask": [False, False, True, True, True], "tokens": 5,
        "rejected_ids": None, "rejected_mask": None,
        "licence": "MIT", "generator": "human", "language": "en", "group_keys": ["tree", "story"],
        "tag_tox": 0.5, "tag_refusal": True,
    }  # fmt: skip
    assert (second["group_keys"], second["tag_tox"]) == ([], None)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (0, ["train-00000-of-00001.parquet"]),
        (4, ["train-00000-of-00001.parquet"]),
        (5, ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]),
        (8, ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]),
    ],
)
def test_shards_hold_no_more_than_asked_and_their_names_say_of_how_many(
    tmp_path: Path, rows: int, names: list[str]
) -> None:
    assert list(write(tmp_path, [masked(n) for n in range(rows)], 4, 3)) == names

    tables = [pq.read_table(tmp_path / name) for name in names]
    assert all(len(table) <= 4 for table in tables)
    assert pa.concat_tables(tables).column("line").to_pylist() == list(range(rows))
    assert all(table.schema.equals(ROW_SCHEMA) for table in tables)


def test_bytes_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    rows = [masked(n) for n in range(2500)]
    tags = {"score": pa.array([n / 7 if n % 5 else None for n in range(2500)])}

    whole = write(tmp_path / "whole", rows, 1500, 2500, tags)

    assert len(whole) == 2
    for batch in (700, 1024, 333):
        assert write(tmp_path / str(batch), rows, 1500, batch, tags) == whole
    groups = pq.ParquetFile(tmp_path / "whole" / "train-00000-of-00002.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [1024, 476]


def test_writer_holds_no_more_than_a_row_group(tmp_path: Path) -> None:
    rows = [masked(n) for n in range(1500)]

    with SplitWriter(tmp_path, "train", 6000, 100_000) as writer:
        for turn in range(4):
            writer.write(row_columns([masked(turn * 1500 + n) for n in range(len(rows))]))
            written = (tmp_path / "train-00000-of-00001.parquet").stat().st_size
            assert written > turn * 1000
            assert sum(len(table) for table in writer._waiting) < 1024


def test_rows_out_of_order_twice_or_not_announced_are_refused(tmp_path: Path) -> None:
    for rows in ([masked(2), masked(1)], [masked(1), masked(1)]):
        with pytest.raises(DataError, match="do not come by rising id"):
            write(tmp_path, rows, 4, 1)
    announced = SplitWriter(tmp_path, "train", 2, 4)
    with pytest.raises(DataError, match="1 rows of train were written, 2 were announced"), announced as writer:
        writer.write(row_columns([masked(1)]))


def test_tags_that_do_not_belong_to_the_rows_are_refused(tmp_path: Path) -> None:
    for tags in ({}, {"other": pa.array([1.0])}, {"score": pa.array([1.0, 2.0])}):
        scored = SplitWriter(tmp_path, "train", 1, 4, {"score": pa.float64()})
        with pytest.raises(DataError, match=r"do not belong to 1 rows with tags \['score'\]"), scored as writer:
            writer.write(row_columns([masked(1)]), tags)


def test_fault_of_the_caller_is_not_hidden_by_the_writer(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), SplitWriter(tmp_path, "train", 5000, 5000) as writer:
        writer.write(row_columns([masked(n) for n in range(2000)]))
        raise KeyError("mine")


def test_dropped_rows_keep_match_tokens_and_score(tmp_path: Path) -> None:
    drops = [Dropped("b", "s", 2, "near_duplicate", "a", None, 0.93), Dropped("c", "s", 1, "over_long", None, 900)]

    write_dropped(tmp_path / "dropped.parquet", drops)

    assert pq.read_table(tmp_path / "dropped.parquet").to_pylist() == [
        {"id": "c", "source": "s", "line": 1, "rule": "over_long", "matched_id": None, "tokens": 900, "score": None},
        {"id": "b", "source": "s", "line": 2, "rule": "near_duplicate", "matched_id": "a", "tokens": None,
         "score": 0.93},
    ]  # fmt: skip
