"""Reading a curated folder back: token rows for training, prompts for evaluation. Knows nothing of how it was made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.row import Message
from qlora_core.data.split import SIDES
from qlora_core.errors import DataError


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row to train on or to score. `loss_mask[i]` is True where predicting `input_ids[i]` carries loss."""

    id: str
    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row to answer. `prompt` is rendered up to and with the generation prompt, its BOS included; add none."""

    id: str
    category: str | None
    prompt: str
    reference: str
    messages: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """What the leak gate needs of a written row."""

    id: str
    messages: tuple[Message, ...]


def read_split(folder: Path, split: str) -> list[TokenRow]:
    """All rows of `train`, `validation` or `test`, ordered by id. Raises DataError for another name or a bad file."""
    columns = _read_columns(folder, split, ["id", "input_ids", "loss_mask"])
    return [TokenRow(*values) for values in zip(*columns, strict=True)]


def read_prompts(folder: Path, split: str, limit: int | None = None) -> list[PromptRow]:
    """The first `limit` prompts of a split by id (None: all). Raises as `read_split` does.

    Ids are content hashes, so the first ones are a sample that depends on nothing but the rows.
    """
    columns = _read_columns(folder, split, ["id", "category", "prompt", "reference", "messages"], limit)
    return [PromptRow(*values) for values in zip(*columns, strict=True)]


def read_conversations(folder: Path, split: str) -> list[StoredConversation]:
    """The conversations of a split as written, ordered by id. Train flags are not stored and come back False."""
    ids, conversations = _read_columns(folder, split, ["id", "messages"])
    return [
        StoredConversation(row_id, tuple(Message(turn["role"], turn["content"]) for turn in turns))
        for row_id, turns in zip(ids, conversations, strict=True)
    ]


def _read_columns(folder: Path, split: str, names: Sequence[str], limit: int | None = None) -> list[list]:
    if split not in SIDES:
        raise DataError(f"unknown split {split!r}; a curated set has {', '.join(SIDES)}")
    path = folder / f"{split}.parquet"
    try:
        table = pq.read_table(path, columns=list(names))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{str(path)!r} is no split of a curated set: {error}. Curate the data again") from error
    if limit is not None:
        table = table.slice(0, limit)
    return [table.column(name).to_pylist() for name in names]
