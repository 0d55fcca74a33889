"""Kept encodings: with and without them the tokens are the same, and a damaged or foreign one is never used."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qlora_core.data import encodings
from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.encodings import PARTS, EncodedRows, Encoder
from qlora_core.data.loss_mask import MaskedRow, encode_proven
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.row_store import RowStore, RowView
from qlora_core.data.tables import ROW_SCHEMA, row_columns
from qlora_core.data.tags.cache import FolderShelf, TagCache


def conversation(number: int) -> Row:
    turns = [Message("user", f"What is {number}?"), Message("assistant", f"it is {number} é.", train=number % 3 > 0)]
    more = [Message("user", "And then?"), Message("assistant", f"then {number + 1}.", train=True)]
    return make_row(Draft([*turns, *more]), "rows.jsonl", number + 1)


def by_id(count: int) -> RowView:
    rows = sorted((conversation(number) for number in range(count)), key=lambda row: row.id)
    return RowStore(rows).select(np.arange(count))


def encoded(encoder: Encoder, rows: RowView, whole: np.ndarray | None = None, size: int = 7) -> pa.Table:
    """All rows through every part, in batches of `size`, as they are written."""
    everything = EncodedRows(encoder, rows, np.ones(len(rows), bool) if whole is None else whole)
    found = [ROW_SCHEMA.empty_table()]
    for part, positions in enumerate(everything.parts(np.arange(len(rows)))):
        batches = [positions[start : start + size] for start in range(0, len(positions), size)]
        for batch in everything.encode(part, batches):
            found.append(batch.table(batch.masked))
    return pa.concat_tables(found)


def anew(chat: ChatTokenizer, rows: RowView) -> pa.Table:
    """What encoding every row gives."""
    return row_columns(encode_proven(chat, list(rows)))


@pytest.fixture(params=["plain_tokenizer", "chatml_tokenizer"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def chat(folder: Path) -> ChatTokenizer:
    return load_chat_tokenizer(folder)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of all rows that are really encoded."""
    ids: list[str] = []

    def watch(chat: ChatTokenizer, rows: list[Row]) -> list[MaskedRow]:
        ids.extend(row.id for row in rows)
        return encode_proven(chat, rows)

    monkeypatch.setattr(encodings, "encode_proven", watch)
    return ids


def test_every_way_gives_what_encoding_anew_gives(folder: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    rows = by_id(90)
    expected = anew(chat, rows)
    cache = TagCache(FolderShelf(tmp_path))
    assert encoded(Encoder(chat, folder), rows) == expected
    assert encoded(Encoder(chat, folder, cache), rows) == expected
    assert encoded(Encoder(chat, folder, cache), rows, size=90) == expected


def test_new_rows_alone_are_encoded(folder: Path, chat: ChatTokenizer, tmp_path: Path, asked: list[str]) -> None:
    encoder = Encoder(chat, folder, TagCache(FolderShelf(tmp_path)))
    encoded(encoder, by_id(60))
    asked.clear()
    found = encoded(encoder, by_id(63))
    assert sorted(asked) == sorted(conversation(number).id for number in (60, 61, 62))
    assert found == anew(chat, by_id(63))
    asked.clear()
    encoded(encoder, by_id(63))
    assert asked == []


def test_cut_rows_are_neither_kept_nor_taken_for_the_whole_ones(
    folder: Path, chat: ChatTokenizer, tmp_path: Path, asked: list[str]
) -> None:
    rows = by_id(20)
    encoder = Encoder(chat, folder, TagCache(FolderShelf(tmp_path)))
    cut = np.arange(20) % 2 == 0
    encoded(encoder, rows, ~cut)
    asked.clear()
    assert encoded(encoder, rows, ~cut) == anew(chat, rows)
    assert sorted(asked) == sorted(row.id for row in rows.select(np.flatnonzero(cut)))


def test_another_template_finds_nothing(
    plain_tokenizer: Path, chatml_tokenizer: Path, tmp_path: Path, asked: list[str]
) -> None:
    cache, rows = TagCache(FolderShelf(tmp_path)), by_id(10)
    encoded(Encoder(load_chat_tokenizer(plain_tokenizer), plain_tokenizer, cache), rows)
    asked.clear()
    other = load_chat_tokenizer(chatml_tokenizer)
    assert encoded(Encoder(other, chatml_tokenizer, cache), rows) == anew(other, rows)
    assert len(asked) == 10


def test_a_damaged_segment_is_named_and_its_rows_are_encoded_anew(
    folder: Path, chat: ChatTokenizer, tmp_path: Path, asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = by_id(40)
    encoder = Encoder(chat, folder, TagCache(FolderShelf(tmp_path)))
    expected = encoded(encoder, rows)
    damaged = sorted(tmp_path.rglob("*.parquet"))[0]
    data = damaged.read_bytes()
    damaged.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    asked.clear()
    assert encoded(encoder, rows) == expected
    assert 0 < len(asked) < 40
    assert damaged.name in caplog.text


def test_parts_keep_the_order_and_lose_nothing(folder: Path, chat: ChatTokenizer) -> None:
    rows = by_id(90)
    parts = EncodedRows(Encoder(chat, folder), rows, np.ones(90, bool)).parts(np.arange(90))
    assert len(parts) == PARTS
    assert np.concatenate(parts).tolist() == list(range(90))
    firsts = [{rows[int(place)].id[0] for place in part} for part in parts]
    assert all(found <= {f"{number:x}"} for number, found in enumerate(firsts))
