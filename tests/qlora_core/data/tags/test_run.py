"""Tagging with and without a cache: the same table, and no work done twice."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.row_store import RowStore
from qlora_core.data.tags.cache import KEY_TYPE, FolderShelf, TagCache
from qlora_core.data.tags.licence import LicenceTagger
from qlora_core.data.tags.run import tag_rows
from qlora_core.data.tags.table import TagStats
from qlora_core.data.tags.tagger import Tagged, fingerprint_of, tag_key, tagged
from qlora_core.data.tags.text_marks import TextMarksTagger
from qlora_core.errors import ConfigError


class LengthTagger:
    """Length of the last turn; fails on what it is told to; notes what it was asked."""

    name = "length"
    cached = True
    schema = pa.schema([("length", pa.int64()), ("opening", pa.string())])

    def __init__(self, version: int = 1, fails_on: str = "") -> None:
        self.fingerprint = fingerprint_of(self.name, version, self.schema, None)
        self.asked: list[str] = []
        self.fails_on = fails_on

    def tag(self, rows: Sequence[Row]) -> Tagged:
        answers = [row.messages[-1].content for row in rows]
        self.asked += answers
        failed = [bool(self.fails_on) and self.fails_on in answer for answer in answers]
        lengths = [None if bad else len(answer) for answer, bad in zip(answers, failed, strict=True)]
        return tagged(self.schema, [lengths, [row.opening for row in rows]], failed)


def rows_of(*answers: str, licence: str | None = None) -> list[Row]:
    turns = [(Message("user", "Q"), Message("assistant", answer, train=True)) for answer in answers]
    return [make_row(Draft(pair, licence=licence), "s", place) for place, pair in enumerate(turns, start=1)]


def test_table_is_aligned_and_equal_texts_are_tagged_once(tmp_path: Path) -> None:
    tagger = LengthTagger()
    made = tag_rows(rows_of("bbb", "a", "bbb", "cc"), [tagger], TagCache(FolderShelf(tmp_path)))
    assert made.table.column("length").to_pylist() == [3, 1, 3, 2]
    assert tagger.asked == ["bbb", "a", "cc"]
    assert made.stats == {"length": TagStats(computed=4, cached=0, failed=0)}


def test_only_new_rows_are_tagged_again(tmp_path: Path) -> None:
    tag_rows(rows_of("a", "bb"), [LengthTagger()], TagCache(FolderShelf(tmp_path)))
    again, changed = LengthTagger(), LengthTagger(version=2)
    made = tag_rows(rows_of("ccc", "bb", "a"), [again], TagCache(FolderShelf(tmp_path)))
    assert made.table.column("length").to_pylist() == [3, 2, 1]
    assert again.asked == ["ccc"]
    assert made.stats["length"] == TagStats(computed=1, cached=2, failed=0)
    tag_rows(rows_of("a", "bb"), [changed], TagCache(FolderShelf(tmp_path)))
    assert changed.asked == ["a", "bb"]


def test_failures_are_null_counted_and_tried_again(tmp_path: Path) -> None:
    cache = TagCache(FolderShelf(tmp_path))
    made = tag_rows(rows_of("ok", "bad", "bad"), [LengthTagger(fails_on="bad")], cache)
    assert made.table.column("length").to_pylist() == [2, None, None]
    assert made.stats["length"].failed == 2
    mended = LengthTagger()
    assert tag_rows(rows_of("ok", "bad"), [mended], cache).table.column("length").to_pylist() == [2, 3]
    assert mended.asked == ["bad"]


def test_what_hangs_on_more_than_the_text_is_never_taken_from_the_cache(tmp_path: Path) -> None:
    cache = TagCache(FolderShelf(tmp_path))
    for licence, expected in (("MIT", "permissive"), ("CC BY-NC", "non_commercial")):
        made = tag_rows(rows_of("a", licence=licence), [LicenceTagger(), LengthTagger()], cache)
        assert made.table.column("licence_class").to_pylist() == [expected]


def test_rejected_answers_and_tools_have_keys_of_their_own(row: Callable[..., Row]) -> None:
    plain, pair, tools = row("a", "b"), row("a", "b", rejected="c"), row("a", "b", tools="[1]")
    keys = [tag_key(one) for one in (plain, pair, tools)]
    assert len(set(keys)) == 3
    assert keys == [bytes.fromhex(one.id)[:16] for one in (plain, pair, tools)]


def test_no_rows_and_no_taggers(tmp_path: Path) -> None:
    made = tag_rows([], [LengthTagger(), LicenceTagger()], TagCache(FolderShelf(tmp_path)))
    assert made.table.num_rows == 0
    assert made.names == ["length", "opening", "licence_id", "licence_class", "provider_terms"]
    assert tag_rows(rows_of("a"), [], None).stats == {}


def test_two_taggers_of_one_column_are_refused() -> None:
    with pytest.raises(ConfigError, match="length, opening, tagger length would be there twice"):
        tag_rows([], [LengthTagger(), LengthTagger()], None)


def test_arrow_backed_rows_give_the_same_table(tmp_path: Path) -> None:
    rows = rows_of(*(f"answer {number} of {number % 7}" for number in range(3000)))
    store = RowStore(rows)
    taggers = [TextMarksTagger(), LicenceTagger(), LengthTagger()]
    expected = tag_rows(rows, taggers, None).table
    cache = TagCache(FolderShelf(tmp_path))
    assert tag_rows(store.select(np.arange(0, 3000, 3)), taggers, cache).table.num_rows == 1000
    assert tag_rows(store, taggers, cache).table.equals(expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), min_size=1, max_size=5))
def test_any_history_of_runs_ends_in_the_table_of_one_run(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[str]]
) -> None:
    cache = TagCache(FolderShelf(tmp_path_factory.mktemp("cache")))
    tagger = LengthTagger()
    for answers in runs:
        made = tag_rows(rows_of(*answers), [tagger], cache)
        assert made.table.equals(tag_rows(rows_of(*answers), [LengthTagger()], None).table)
    assert len(tagger.asked) == len({answer for answers in runs for answer in answers})


def keys_of(*numbers: int) -> np.ndarray:
    return np.array([bytes([number] * 16) for number in numbers], dtype=KEY_TYPE)


def table_of(*values: int) -> pa.Table:
    return pa.table({"value": pa.array(values, type=pa.int64())})


def test_many_small_segments_become_one_and_nothing_is_lost(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path)
    cache = TagCache(shelf)
    for number in range(30):
        cache.append("f", keys_of(number), table_of(number))
        assert len(shelf.sizes("f")) <= 9
    wanted = keys_of(29, 3, 200, 0)
    hit, found = TagCache(shelf).lookup("f", table_of().schema, wanted)
    assert hit.tolist() == [True, True, False, True]
    assert found.column("value").to_pylist() == [29, 3, 0]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other columns"])
def test_a_damaged_segment_is_named_set_aside_and_tagged_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TagCache(FolderShelf(tmp_path))
    tagger = LengthTagger()
    tag_rows(rows_of("a", "bb"), [tagger], cache)
    (file,) = tmp_path.rglob("*.parquet")
    data = file.read_bytes()
    if damage == "other columns":
        file.unlink()
        cache.append(tagger.fingerprint, keys_of(1), table_of(1))
        (file,) = tmp_path.rglob("*.parquet")
    else:
        file.write_bytes({"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-3], "empty": b""}[damage])
    again = LengthTagger()
    with caplog.at_level("WARNING"):
        made = tag_rows(rows_of("a", "bb"), [again], cache)
    assert made.table.column("length").to_pylist() == [1, 2]
    assert again.asked == ["a", "bb"]
    assert file.name in caplog.text
    assert (file.parent / f"{file.name}.damaged").exists()
    tag_rows(rows_of("a", "bb"), [third := LengthTagger()], cache)
    assert third.asked == []


def test_a_segment_merged_away_between_listing_and_reading_is_found_in_the_merged_one(tmp_path: Path) -> None:
    class Racing(FolderShelf):
        """Somebody else merges just after the listing was made."""

        raced = False

        def read(self, fingerprint: str, name: str) -> bytes | None:
            if not self.raced:
                self.raced = True
                other = TagCache(FolderShelf(tmp_path))
                for number in range(10, 20):
                    other.append(fingerprint, keys_of(number), table_of(number))
            return super().read(fingerprint, name)

    TagCache(FolderShelf(tmp_path)).append("f", keys_of(1), table_of(1))
    hit, found = TagCache(Racing(tmp_path)).lookup("f", table_of().schema, keys_of(1, 12))
    assert hit.tolist() == [True, True]
    assert found.column("value").to_pylist() == [1, 12]
