"""Tag segments in a store: found by others, never believed unread, left alone by garbage collection."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qlora_core.data.tags.cache import KEY_TYPE, TagCache
from qlora_core.store.gc import collect
from qlora_core.store.layout import QUARANTINE, TAGS
from qlora_core.store.store import Store, open_store
from qlora_core.store.tag_shelf import StoreTagShelf
from qlora_core.store.verification import verify

ONE, OTHER = "1" * 64, "2" * 64
SCHEMA = pa.schema([("value", pa.int64())])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/store", tmp_path / "unused")


def keys_of(*numbers: int) -> np.ndarray:
    return np.array([bytes([number] * 16) for number in numbers], dtype=KEY_TYPE)


def append(store: Store, fingerprint: str, *numbers: int) -> None:
    TagCache(StoreTagShelf(store.backend)).append(
        fingerprint, keys_of(*numbers), pa.table({"value": pa.array(numbers, type=pa.int64())})
    )


def lookup(store: Store, fingerprint: str, *numbers: int) -> list[int]:
    return TagCache(StoreTagShelf(store.backend)).lookup(fingerprint, SCHEMA, keys_of(*numbers))[1]["value"].to_pylist()


def test_tags_are_found_by_another_process_and_under_their_fingerprint_only(store: Store) -> None:
    append(store, ONE, 3, 1)
    append(store, ONE, 2)
    assert lookup(store, ONE, 1, 2, 3, 4) == [1, 2, 3]
    assert lookup(store, OTHER, 1, 2, 3, 4) == []


def test_segments_are_merged_in_the_store_too(store: Store) -> None:
    for number in range(20):
        append(store, ONE, number)
    assert len(StoreTagShelf(store.backend).sizes(ONE)) <= 9
    assert lookup(store, ONE, *range(20)) == list(range(20))


def test_a_damaged_segment_goes_to_quarantine(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    append(store, ONE, 1)
    (file,) = (tmp_path / "store" / TAGS).rglob("*.parquet")
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level("WARNING"):
        assert lookup(store, ONE, 1) == []
    assert file.name in caplog.text
    assert not file.exists()
    assert [each.name for each in store.backend.list(f"{QUARANTINE}/") if file.name in each.name]


def test_garbage_collection_leaves_tags_alone(store: Store) -> None:
    append(store, ONE, 1)
    report = collect(store, keep_last=0, older_than_s=0)
    assert (report.blobs, report.leftovers) == (0, 0)
    assert lookup(store, ONE, 1) == [1]


def test_verification_names_a_damaged_segment_and_repair_takes_it_away(store: Store, tmp_path: Path) -> None:
    append(store, ONE, 1)
    append(store, OTHER, 1)
    assert verify(store).ok
    (file,) = (tmp_path / "store" / TAGS / ONE).glob("*.parquet")
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1])
    found = verify(store, repair=True)
    assert [name.rpartition("/")[2] for name in found.records] == [file.name]
    assert not file.exists()
    assert (lookup(store, ONE, 1), lookup(store, OTHER, 1)) == ([], [1])
