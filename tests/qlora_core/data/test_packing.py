"""Best-fit decreasing against a slow reference, its promises as properties, and the file it is kept in."""

import itertools
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.packing import (
    PACKS_FILE,
    Packs,
    count_packs,
    pack_rows,
    packing_summary,
    read_packs,
    sequence_tokens,
    write_packs,
)
from qlora_core.errors import DataError

TOKENS = 20
Lengths = st.lists(st.integers(1, TOKENS), max_size=60)


def _ids(count: int) -> list[str]:
    return [f"row-{number:03d}" for number in range(count)]


def _pack(lengths: list[int], ids: list[str] | None = None) -> Packs:
    return pack_rows(ids or _ids(len(lengths)), np.array(lengths, np.int64), np.ones(len(lengths)), TOKENS)


def _by_sequence(packs: Packs, values: list) -> list[list]:
    bounds = packs.starts.tolist()
    return [[values[row] for row in packs.order[a:b]] for a, b in itertools.pairwise(bounds)]


def _room_left_by_scanning(lengths: list[int]) -> list[int]:
    """Best-fit decreasing as the textbook has it: look at every sequence for each row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda place: rooms[place])] -= length
        else:
            rooms.append(TOKENS - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=60)
@given(Lengths)
def test_sequences_are_those_of_textbook_best_fit_decreasing(lengths: list[int]) -> None:
    packs = _pack(lengths)
    assert sorted(TOKENS - sum(held) for held in _by_sequence(packs, lengths)) == _room_left_by_scanning(lengths)


@settings(deadline=None, max_examples=60)
@given(Lengths)
def test_every_row_is_whole_in_one_sequence_and_no_two_sequences_could_be_one(lengths: list[int]) -> None:
    packs = _pack(lengths)
    assert sorted(packs.order.tolist()) == list(range(len(lengths)))
    fills = sorted(sum(held) for held in _by_sequence(packs, lengths))
    assert all(0 < fill <= TOKENS for fill in fills)
    assert len(fills) < 2 or fills[0] + fills[1] > TOKENS


@settings(deadline=None, max_examples=60)
@given(Lengths, st.integers(0, 9))
def test_the_order_of_the_rows_changes_nothing(lengths: list[int], seed: int) -> None:
    ids = _ids(len(lengths))
    straight = _by_sequence(_pack(lengths, ids), ids)
    shuffled = list(range(len(lengths)))
    random.Random(seed).shuffle(shuffled)
    other_ids = [ids[row] for row in shuffled]
    assert _by_sequence(_pack([lengths[row] for row in shuffled], other_ids), other_ids) == straight


def test_a_known_case_by_hand() -> None:
    # 12 and 8 fill one; 11 leaves 9, into which 7 goes; 6, 6 and 5 share a third; ties by id put c before d
    ids = ["a", "b", "c", "d", "e", "f", "g"]
    packs = _pack([12, 11, 6, 6, 8, 7, 5], ids)
    assert _by_sequence(packs, ids) == [["a", "e"], ["b", "f"], ["c", "d", "g"]]


def test_rows_that_train_nothing_are_in_no_sequence() -> None:
    packs = pack_rows(["a", "b", "c"], np.array([9, 50, 4]), np.array([3, 0, 1]), TOKENS)
    assert _by_sequence(packs, ["a", "b", "c"]) == [["a", "c"]]


def test_a_row_longer_than_a_sequence_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"row b has 21 tokens, but a packed sequence takes 20; .* at least 21"):
        pack_rows(["a", "b"], np.array([5, 21]), np.array([1, 1]), TOKENS)


def test_length_of_a_sequence_is_the_window_or_more() -> None:
    assert sequence_tokens(None, 512) == 512
    assert sequence_tokens(2048, 512) == 2048
    with pytest.raises(DataError, match=r"data\.packing\.tokens is 256, but a row may have 512 tokens"):
        sequence_tokens(256, 512)


def test_summary_counts_places_and_trained_tokens() -> None:
    lengths, trained = np.array([12, 11, 8, 7, 30]), np.array([3, 4, 5, 6, 0])
    packs = pack_rows(_ids(5), lengths, trained, TOKENS)
    assert packing_summary(packs, lengths, trained) == {
        "sequence_tokens": 20,
        "sequences": 2,
        "rows": 4,
        "most_rows": 2,
        "tokens": 38,
        "trained_tokens": 18,
        "fill": 0.95,
        "fill_unpacked": 0.475,
        "trained_share": round(18 / 38, 6),
    }


def test_short_rows_fill_sequences_nearly_whole() -> None:
    lengths = (np.random.default_rng(0).lognormal(4, 0.7, 5000).astype(np.int64) + 4).clip(max=512)
    summary = packing_summary(pack_rows(_ids(5000), lengths, np.ones(5000), 512), lengths, np.ones(5000))
    assert summary["fill"] > 0.99
    assert summary["fill_unpacked"] < 0.2


@pytest.mark.parametrize("as_arrow", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, as_arrow: bool) -> None:
    lengths, names = np.array([12, 11, 8, 7, 6]), _ids(5)
    ids = pa.array(names) if as_arrow else names
    packs = pack_rows(ids, lengths, np.ones(5), TOKENS)
    write_packs(tmp_path / PACKS_FILE, packs, ids)
    assert read_packs(tmp_path) == _by_sequence(packs, names)
    assert count_packs(tmp_path) == len(packs) == 3


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        ids = [f"row-{row}" for row in order]
        lengths = np.array([5 + row for row in order])
        write_packs(tmp_path / name, pack_rows(ids, lengths, np.ones(3), TOKENS), ids)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_rows_are_no_sequences(tmp_path: Path) -> None:
    packs = pack_rows([], np.array([]), np.array([]), TOKENS)
    assert len(packs) == 0
    assert packing_summary(packs, np.array([]), np.array([]))["fill"] == 0.0
    write_packs(tmp_path / PACKS_FILE, packs, [])
    assert read_packs(tmp_path) == []


def test_a_folder_that_was_not_packed_has_none(tmp_path: Path) -> None:
    assert read_packs(tmp_path) is None
    assert count_packs(tmp_path) is None


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / PACKS_FILE).write_bytes(b"PAR1 and then nothing")
    for read in (read_packs, count_packs):
        with pytest.raises(DataError, match=r"packs\.parquet' is no list of packed rows: .* Curate the data again"):
            read(tmp_path)
