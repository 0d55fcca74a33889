"""Reading a curated folder back: all shards of a side, in order, or a refusal."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qlora_core.data.dataset import read_conversations, read_prompts, read_split
from qlora_core.data.loss_mask import MaskedRow, TrainedTurn
from qlora_core.data.row import Message, Row
from qlora_core.data.row_store import rows_of
from qlora_core.data.shards import shard_files
from qlora_core.data.tables import SplitWriter, row_columns
from qlora_core.errors import DataError


def conversations(folder: Path, split: str) -> list[Row]:
    return [row for batch in read_conversations(folder, split) for row in rows_of(batch)]


READERS = {"read_split": read_split, "read_prompts": read_prompts, "read_conversations": conversations}


def masked(number: int, answer: str = "answer") -> MaskedRow:
    messages = (
        Message("user", f"question {number}"),
        Message("assistant", "hm", train=False),
        Message("user", "and?"),
        Message("assistant", answer, train=True),
    )
    row = Row(f"{number:064x}", messages, "a", number, category="c", rejected="no", group_keys=("tree",), tools='["a"]')
    return MaskedRow(row, [1, 2, 3 + number], [False, True, True], (TrainedTurn(3, f"prompt {number}", 1, 2),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten rows in four shards, ordered by id."""
    with SplitWriter(tmp_path, "train", 10, 3) as writer:
        writer.write(row_columns([masked(n) for n in range(10)]))
    return tmp_path


def test_all_shards_come_in_order(folder: Path) -> None:
    ids = [f"{n:064x}" for n in range(10)]

    assert [row.id for row in read_split(folder, "train")] == ids
    assert [row.input_ids[2] for row in read_split(folder, "train")] == list(range(3, 13))
    assert [row.id for row in read_prompts(folder, "train")] == ids
    assert [row.id for row in conversations(folder, "train")] == ids
    assert [(row.source, row.line) for row in conversations(folder, "train")] == [("train", n) for n in range(1, 11)]


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 10, 99])
def test_first_prompts_are_the_first_of_all(folder: Path, limit: int) -> None:
    assert read_prompts(folder, "train", limit) == read_prompts(folder, "train")[:limit]


def test_prompt_holds_what_an_evaluation_needs(folder: Path) -> None:
    [first] = read_prompts(folder, "train", 1)

    assert (first.prompt, first.reference, first.category) == ("prompt 0", "answer", "c")
    assert first.messages[0] == {"role": "user", "content": "question 0"}


def test_conversation_comes_back_with_flags_groups_and_worse_answer(folder: Path) -> None:
    first = conversations(folder, "train")[0]

    assert first.messages == masked(0).row.messages
    assert (first.group_keys, first.rejected, first.tools) == (("tree",), "no", '["a"]')


def test_conversations_take_the_memory_of_a_batch(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, "test", 6000, 6000) as writer:
        for start in range(0, 6000, 1000):
            writer.write(row_columns([masked(n, f"{n} " * 300) for n in range(start, start + 1000)]))

    tracemalloc.start()
    characters = sum(
        len(row.messages[3].content) for batch in read_conversations(tmp_path, "test") for row in rows_of(batch)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert characters > 8_000_000
    assert peak < 4_000_000


def lose_the_first(folder: Path) -> None:
    (folder / "train-00000-of-00004.parquet").unlink()


def lose_the_last(folder: Path) -> None:
    (folder / "train-00003-of-00004.parquet").unlink()


def lose_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def mix_two_writings(folder: Path) -> None:
    (folder / "train-00000-of-00002.parquet").write_bytes((folder / "train-00000-of-00004.parquet").read_bytes())


def keep_the_old_layout_alone(folder: Path) -> None:
    (folder / "train-00000-of-00004.parquet").rename(folder / "train.parquet")
    for path in folder.glob("train-*"):
        path.unlink()


def cut_a_file(folder: Path) -> None:
    path = folder / "train-00001-of-00004.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def lose_columns(folder: Path) -> None:
    path = folder / "train-00001-of-00004.parquet"
    pq.write_table(pq.read_table(path).select(["source"]), path)


BREAKS: dict[Callable[[Path], None], str] = {
    lose_the_first: "train-00000-of-00004.parquet is missing",
    lose_the_last: "train-00003-of-00004.parquet is missing",
    lose_all: "no such file",
    mix_two_writings: r"its files say they are \[2, 4\] in all",
    keep_the_old_layout_alone: "no such file",
    cut_a_file: "train-00001-of-00004.parquet' is no split",
    lose_columns: "train-00001-of-00004.parquet' is no split",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", BREAKS)
def test_incomplete_or_damaged_set_is_refused_by_every_reader(
    folder: Path, damage: Callable[[Path], None], reader: str
) -> None:
    assert len(list(READERS[reader](folder, "train"))) == 10
    damage(folder)

    with pytest.raises(DataError, match=rf"{BREAKS[damage]}.*urate the data again"):
        list(READERS[reader](folder, "train"))


def test_other_files_beside_the_shards_are_none_of_them(folder: Path) -> None:
    (folder / "train-control-00000-of-00001.parquet").write_bytes(b"another set")
    (folder / "train-notes.parquet").write_bytes(b"notes")

    assert len(shard_files(folder, "train")) == 4


def test_unknown_side_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="unknown split 'dev'; a curated set has train, validation, test"):
        read_split(folder, "dev")
