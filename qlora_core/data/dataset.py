"""Reading a curated folder back: token rows for training, prompts for evaluation. Knows nothing of how it was made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qlora_core.data.row_store import ROLES, SCHEMA, TRAINED
from qlora_core.data.shards import shard_files
from qlora_core.errors import DataError

BATCH_ROWS = 1024
_LABELS = ("category", "language")
REJECTED = ("rejected_ids", "rejected_mask")
"""Columns of preference pairs; null in other rows, and absent from sets curated before they were written."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row to train on or to score. `loss_mask[i]` is True where predicting `input_ids[i]` carries loss."""

    id: str
    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class PreferenceRow(TokenRow):
    """A row whose last answer was preferred to another one: the same conversation, ending on the worse answer.

    `rejected_mask` is to `rejected_ids` what `loss_mask` is to `input_ids`, which hold the better one.
    """

    rejected_ids: list[int]
    rejected_mask: list[bool]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row to answer. `prompt` is rendered up to and with the generation prompt, its BOS included; add none."""

    id: str
    category: str | None
    prompt: str
    reference: str
    messages: list[dict[str, str]]


class RowLabels(NamedTuple):
    """What a row is filed under, as its source says; None where it says nothing."""

    category: str | None
    language: str | None


def read_split(folder: Path, split: str) -> list[TokenRow]:
    """All rows of `train`, `validation` or `test`, ordered by id; those that hold a preference pair are PreferenceRows.

    Raises DataError for another name or a bad file.
    """
    files = shard_files(folder, split)
    return [
        TokenRow(*row) if rejected_ids is None else PreferenceRow(row[0], row[1], row[2], rejected_ids, rejected_mask)
        for *row, rejected_ids, rejected_mask in _rows(files, ["id", "input_ids", "loss_mask"], REJECTED)
    ]


def read_prompts(folder: Path, split: str, limit: int | None = None) -> list[PromptRow]:
    """The first `limit` prompts of a split by id (None: all). Raises as `read_split` does.

    Ids are content hashes, so the first ones are a sample that depends on nothing but the rows.
    """
    files = shard_files(folder, split)
    names = ["id", "category", "prompt", "reference", "messages"]
    return [PromptRow(*values) for values in islice(_rows(files, names), limit)]


def read_labels(folder: Path, split: str) -> dict[str, RowLabels]:
    """The labels of every row of a split by its id. Raises as `read_split` does."""
    files = shard_files(folder, split)
    return {row_id: RowLabels(category, language) for row_id, category, language in _rows(files, ["id"], _LABELS)}


def read_conversations(folder: Path, split: str) -> Iterator[pa.RecordBatch]:
    """The conversations of a split as written, ordered by id, in batches with the columns of `row_store.SCHEMA`.

    A row's source is the name of the split, its line its place there from 1. Labels are null; tools are too in sets
    that were curated before they were written. Raises as `read_split` does, for a damaged file when it is reached.
    """
    line = 1
    for path in shard_files(folder, split):
        for batch in _batches(path, ["id", "messages", "train", "group_keys", "rejected"], ["tools"]):
            yield _conversations(batch, split, line)
            line += len(batch)


def _conversations(batch: pa.RecordBatch, split: str, line: int) -> pa.RecordBatch:
    messages, train = batch.column("messages"), batch.column("train")
    said = messages.flatten()
    roles = pc.call_function("index_in", [said.field("role")], pc.SetLookupOptions(pa.array(ROLES))).to_numpy()
    flags = train.flatten().to_numpy(zero_copy_only=False)
    codes = pa.py_buffer(roles.astype(np.uint8) | np.where(flags, np.uint8(TRAINED), np.uint8(0)))
    offsets = pa.array(messages.offsets.to_numpy() - messages.offsets[0].as_py())
    count = len(batch)
    columns = {
        "id": batch.column("id"),
        "turns": pa.Array.from_buffers(pa.binary(), count, [None, offsets.buffers()[1], codes]),
        "contents": pa.ListArray.from_arrays(offsets, said.field("content")),
        "source": pa.array([split] * count),
        "line": pa.array(np.arange(line, line + count)),
        "trimmed": pa.array(np.zeros(count, np.int32)),
        "tools": batch.column("tools") if "tools" in batch.schema.names else pa.nulls(count, pa.string()),
        "rejected": batch.column("rejected"),
        "group_keys": batch.column("group_keys"),
    }
    arrays = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(count, field.type)
        for field in SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _rows(files: Sequence[Path], names: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[Any, ...]]:
    """The rows of the files in order, each as its values in these columns; optional ones that are absent give None."""
    for path in files:
        for batch in _batches(path, names, optional):
            # Columns held by the zip alone: a name for them would keep a batch alive beside the next one
            found = (
                batch.column(name).to_pylist() if name in batch.schema.names else [None] * len(batch)
                for name in (*names, *optional)
            )
            yield from zip(*found, strict=True)


def _batches(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """These columns of a file, some rows at a time; without those of the optional ones that are absent."""
    try:
        with pq.ParquetFile(path) as file:
            present = [name for name in optional if name in file.schema_arrow.names]
            for batch in file.iter_batches(BATCH_ROWS, columns=[*names, *present]):
                yield batch.select([*names, *present])
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> DataError:
    return DataError(f"{str(path)!r} is no split of a curated set: {error}. Curate the data again")
