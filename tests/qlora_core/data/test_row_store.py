"""Rows in Arrow: they come back as they went in, in any order, and take little more memory than their bytes."""

import json
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data import row_store
from qlora_core.data.row import Message, Row
from qlora_core.data.row_store import RowStore, RowView
from qlora_core.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MESSAGES = st.lists(st.builds(Message, st.sampled_from(row_store.ROLES), TEXT, st.booleans()), max_size=4).map(tuple)
ROWS = st.builds(
    Row,
    id=TEXT,
    messages=MESSAGES,
    source=TEXT,
    line=st.integers(-(2**63), 2**63 - 1),
    category=st.none() | TEXT,
    licence=st.none() | TEXT,
    generator=st.none() | TEXT,
    trimmed=st.integers(0, 2**31 - 1),
    language=st.none() | TEXT,
    tools=st.none() | TEXT,
    rejected=st.none() | TEXT,
    group_keys=st.lists(TEXT, max_size=3).map(tuple),
)


def row(number: int) -> Row:
    messages = (Message("user", f"question {number}"), Message("assistant", f"answer {number}", train=True))
    return Row(f"{number:064x}", messages, "set", number, category="sums" if number % 3 else None)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "BATCH_ROWS", 4)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(ROWS, max_size=9))
def test_every_field_comes_back_exactly(rows: list[Row]) -> None:
    store = RowStore()
    for number, given_row in enumerate(rows):
        store.append(given_row)
        if number % 4 == 3:
            assert store.nbytes > 0  # closes a batch

    assert list(store) == rows
    assert [store[place] for place in range(len(store))] == rows
    assert [store[-1 - place] for place in range(len(store))] == rows[::-1]


@pytest.mark.usefixtures("small_batches")
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_select_equals_indexing_a_list(data: st.DataObject) -> None:
    rows = [row(number) for number in range(data.draw(st.integers(1, 23)))]
    places = st.lists(st.integers(0, len(rows) - 1), max_size=30)
    first = data.draw(places)

    view = RowStore(rows).select(np.array(first))

    assert list(view) == [view[i] for i in range(len(view))] == [rows[place] for place in first]
    if first:
        second = data.draw(st.lists(st.integers(0, len(first) - 1), max_size=30))
        again = view.select(second)
        assert list(again) == [rows[first[place]] for place in second]
        assert again.positions.tolist() == [first[place] for place in second]


@pytest.mark.usefixtures("small_batches")
def test_slices_are_views_in_order() -> None:
    rows = [row(number) for number in range(11)]
    store = RowStore(rows)

    for part in (slice(2, 9), slice(None, None, -1), slice(-3, None), slice(5, 5)):
        assert isinstance(store[part], RowView)
        assert list(store[part]) == rows[part]
        assert list(store[1:][part]) == rows[1:][part]


@pytest.mark.usefixtures("small_batches")
def test_view_stays_as_it_was_when_rows_are_added() -> None:
    store = RowStore(row(number) for number in range(6))
    view = store[3:]

    store.extend(row(number) for number in range(6, 20))

    assert [found.line for found in view] == [3, 4, 5]
    assert len(store) == 20


def test_concatenated_stores_share_their_batches() -> None:
    stores = [RowStore(row(number) for number in range(start, start + 3)) for start in (0, 3)]

    whole = RowStore.concatenate([*stores, RowStore()])

    assert list(whole) == [row(number) for number in range(6)]
    assert whole.nbytes == sum(store.nbytes for store in stores)


def test_columns_are_read_without_rows() -> None:
    store = RowStore(row(number) for number in range(5))

    assert store.column("line").to_pylist() == [0, 1, 2, 3, 4]
    assert store.column("category").to_pylist() == [None, "sums", "sums", None, "sums"]
    assert RowStore().column("id").to_pylist() == []


def test_empty_store_is_an_empty_sequence() -> None:
    store = RowStore()

    assert (len(store), list(store), list(store.select(np.array([]))), store.nbytes) == (0, [], [], 0)
    with pytest.raises(IndexError):
        store[0]


@pytest.mark.parametrize("positions", [[3], [-1], [0.5], [True]])
def test_positions_outside_of_the_store_are_refused(positions: Sequence[int]) -> None:
    with pytest.raises(IndexError):
        RowStore(row(number) for number in range(3)).select(positions)


def test_text_that_is_no_unicode_is_refused_with_its_place() -> None:
    broken = Row("0", (Message("user", "\ud800"),), "set", 7)

    with pytest.raises(DataError, match="set from line 7"):
        RowStore([broken]).column("id")


GROWTH = """
import json, sys
from qlora_core.data.row import Message, Row
from qlora_core.data.row_store import RowStore

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def row(number):
    messages = (Message("user", f"What comes after the number {number}?"), Message("assistant", f"{number + 1}", True))
    return Row(f"{number:064x}", messages, "set", number, category="sums")

RowStore([row(0)]).nbytes
before = peak()
store = RowStore(map(row, range(int(sys.argv[1]))))
stored = store.nbytes
appended = peak()
seen = sum(found.line for found in store)
print(json.dumps({"stored": stored, "grown": appended - before, "iterated": peak() - appended, "seen": seen}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_grows_by_little_more_than_the_arrow_size() -> None:
    rows = 100_000
    done = subprocess.run([sys.executable, "-c", GROWTH, str(rows)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)

    assert found["seen"] == rows * (rows - 1) // 2
    assert found["grown"] < 1.3 * found["stored"]
    assert found["iterated"] < 0.2 * found["stored"]
