"""Reading a curated folder back: token rows for training, prompts for evaluation. Knows nothing of how it was made."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.row import Message
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


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """What the leak gate needs of a written row. `rejected` is the worse answer of a preference pair."""

    id: str
    messages: tuple[Message, ...]
    group_keys: tuple[str, ...] = ()
    rejected: str | None = None


class StoredConversations(Iterable[StoredConversation]):
    """The conversations of a side, read from its files batch by batch each time they are gone through."""

    def __init__(self, folder: Path, split: str) -> None:
        self._files = shard_files(folder, split)

    def __len__(self) -> int:
        return sum(_row_count(path) for path in self._files)

    def __iter__(self) -> Iterator[StoredConversation]:
        for values in _rows(self._files, ["id", "messages", "train", "group_keys", "rejected"]):
            row_id, turns, train, group_keys, rejected = values
            messages = tuple(
                Message(turn["role"], turn["content"], flag) for turn, flag in zip(turns, train, strict=True)
            )
            yield StoredConversation(row_id, messages, tuple(group_keys), rejected)


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


def read_conversations(folder: Path, split: str) -> StoredConversations:
    """The conversations of a split as written, ordered by id, read as they are gone through; no more than a batch of
    them is in memory. Raises as `read_split` does, for a damaged file when it is reached.
    """
    return StoredConversations(folder, split)


def _rows(files: Sequence[Path], names: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[Any, ...]]:
    """The rows of the files in order, each as its values in these columns; optional ones that are absent give None."""
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                present = [name for name in optional if name in file.schema_arrow.names]
                for batch in file.iter_batches(BATCH_ROWS, columns=[*names, *present]):
                    # Columns held by the zip alone: a name for them would keep a batch alive beside the next one
                    found = (batch.column(name).to_pylist() for name in (*names, *present))
                    absent = ([None] * len(batch) for _ in range(len(optional) - len(present)))
                    yield from zip(*found, *absent, strict=True)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise _unusable(path, error) from error


def _row_count(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> DataError:
    return DataError(f"{str(path)!r} is no split of a curated set: {error}. Curate the data again")
