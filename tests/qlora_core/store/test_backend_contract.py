"""What any place promises underneath: records with conditional writes, listings, blobs in areas, verified ranges."""

import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import CorruptArtifactError, StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.contents import seal
from qlora_core.store.gc import collect
from qlora_core.store.layout import BLOBS, blob_name
from qlora_core.store.manifest import PIECE_BYTES, FileEntry

Build = Callable[[Path], None]
NAME = "v1/pin/best.json"


@pytest.fixture
def backend(place: Any) -> Any:
    return place.store.backend


def test_record_is_created_once_and_read_back(place: Any, backend: Any) -> None:
    assert backend.read(NAME) is None
    tag = backend.create(NAME, b"one")
    assert tag
    assert backend.create(NAME, b"two") is None
    for reader in (backend, place.reader().backend):
        record = reader.read(NAME)
        assert (record.data, record.tag) == (b"one", tag)


def test_record_is_replaced_only_by_who_knows_its_tag(backend: Any) -> None:
    first = backend.create(NAME, b"one")
    second = backend.replace(NAME, b"two", first)
    assert second not in (None, first)
    assert backend.replace(NAME, b"three", first) is None
    assert backend.read(NAME).data == b"two"
    assert backend.replace(NAME, b"four", second)
    assert backend.read(NAME).data == b"four"


def test_record_that_is_not_there_is_not_replaced(backend: Any) -> None:
    tag = backend.create(NAME, b"one")
    assert backend.remove(NAME)
    assert backend.replace(NAME, b"two", tag) is None
    assert backend.read(NAME) is None


def test_record_is_removed_only_by_who_knows_its_tag_or_asks_for_none(backend: Any) -> None:
    first = backend.create(NAME, b"one")
    second = backend.replace(NAME, b"two", first)
    assert not backend.remove(NAME, first)
    assert backend.read(NAME).data == b"two"
    assert backend.remove(NAME, second)
    assert backend.read(NAME) is None
    assert not backend.remove(NAME)
    assert not backend.remove(NAME, second)
    backend.create(NAME, b"three")
    assert backend.remove(NAME)


def test_one_of_many_swaps_at_once_wins(place: Any, backend: Any) -> None:
    backends = [place.reader().backend for _ in range(6)]

    def swap(number: int, tag: str | None) -> str | None:
        data = f"{tag} {number}".encode()
        return backends[number].replace(NAME, data, tag) if tag else backends[number].create(NAME, data)

    tag = None
    with ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            swapped = list(pool.map(swap, range(6), [tag] * 6))
            (winner,) = [number for number, fresh in enumerate(swapped) if fresh is not None]
            record = backend.read(NAME)
            assert (record.data, record.tag) == (f"{tag} {winner}".encode(), swapped[winner])
            tag = record.tag


def test_listing_is_sorted_and_only_what_is_under_the_prefix(place: Any, backend: Any) -> None:
    inside = ["v1/ref/a-b.json", "v1/ref/a.json", "v1/ref/a/b.json", "v1/ref/a0.json", "v1/ref/z/y/x.json"]
    for name in [*reversed(inside), "v1/reflection/a.json", "v1/pin/a.json"]:
        backend.create(name, name.encode())
    listed = list(place.reader().backend.list("v1/ref/"))
    assert [entry.name for entry in listed] == inside
    assert [entry.size_bytes for entry in listed] == [len(name) for name in inside]
    assert all(abs(entry.modified - datetime.now(UTC)) < timedelta(minutes=5) for entry in listed)
    assert list(backend.list("v1/work/")) == []


def test_what_is_set_aside_is_gone_from_its_place_and_kept(place: Any, backend: Any) -> None:
    backend.create(NAME, b"doubtful")
    backend.set_aside(NAME)
    backend.set_aside(NAME)
    assert backend.read(NAME) is None
    (kept,) = place.names()
    assert kept.startswith("v1/quarantine/pin/best.json-")
    assert backend.read(kept).data == b"doubtful"


def test_areas_keep_blobs_apart(place: Any, backend: Any, build: Build) -> None:
    area = "v1/work/trial-1/blob"
    with backend.staging() as folder:
        build(folder)
        files = seal(folder)
        backend.send(folder, files, area)
    assert {entry.name for entry in backend.list(f"{area}/")} == {
        blob_name(entry.sha256, area) for entry in files.values()
    }
    assert list(backend.list(f"{BLOBS}/")) == []
    elsewhere = place.reader().backend
    elsewhere.fetch(files.values(), area)
    assert elsewhere.pool.view("0" * 64, files, area) is not None
    assert [backend.blob_fault(entry, area) for entry in files.values()] == [None] * len(files)
    with pytest.raises(CorruptArtifactError, match="is missing"):
        elsewhere.fetch(files.values(), BLOBS)


def test_staging_folder_is_gone_however_the_block_ends(place: Any, backend: Any) -> None:
    with pytest.raises(ValueError, match="enough"), backend.staging() as folder:
        assert list(folder.iterdir()) == []
        (folder / "half.json").write_text("{}")
        raise ValueError("enough")
    assert not folder.exists()
    assert place.names() == []


def test_fault_of_a_blob_is_told_and_changes_nothing(place: Any, key: StageKey, build: Build, files: Any) -> None:
    manifest = place.store.get_or_build(key, build)[0].manifest
    entry = manifest.files["config.json"]
    place.change("config.json", files["config.json"][:-1] + b"?")
    before = place.names()
    fault = place.reader().backend.blob_fault(entry, BLOBS)
    assert entry.sha256 in fault
    assert sha256(files["config.json"][:-1] + b"?").hexdigest() in fault
    place.change("config.json", None)
    assert entry.sha256 in place.reader().backend.blob_fault(entry, BLOBS)
    assert [name for name in before if entry.sha256 not in name] == place.names()


def test_ranges_are_what_was_asked_for(place: Any, key: StageKey, build: Build, files: Any) -> None:
    manifest = place.store.get_or_build(key, build)[0].manifest
    entry, content = manifest.files["model.safetensors"], files["model.safetensors"]
    backend = place.reader().backend
    for offset, length in [(0, len(content)), (0, 0), (17, 100), (len(content) - 1, 1), (len(content), 0)]:
        assert backend.read_range(entry, offset, length, BLOBS) == content[offset : offset + length]
    for offset, length in [(-1, 2), (0, -1), (0, len(content) + 1), (len(content), 1)]:
        with pytest.raises(StoreError, match="not inside blob"):
            backend.read_range(entry, offset, length, BLOBS)


def test_range_of_a_spoiled_or_missing_blob_is_refused(place: Any, key: StageKey, build: Build, files: Any) -> None:
    manifest = place.store.get_or_build(key, build)[0].manifest
    entry, content = manifest.files["model.safetensors"], files["model.safetensors"]
    # The byte that changed is outside the range: it is verified all the same.
    for changed in (content[:-1] + b"!", content[:-1], b"", None):
        place.change("model.safetensors", changed)
        with pytest.raises(CorruptArtifactError, match=entry.sha256):
            place.reader().backend.read_range(entry, 0, 10, BLOBS)


@pytest.mark.parametrize("place", ["folder", "bucket"], indirect=True)
def test_long_file_is_verified_piece_by_piece(place: Any, key: StageKey) -> None:
    content = bytearray(random.Random(7).randbytes(1 << 16) * (PIECE_BYTES >> 16)) + b"and a bit"

    def build(folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(content)

    place.store.get_or_build(key, build)
    read = place.reader().get(key)
    entry: FileEntry = read.manifest.files["weights.safetensors"]
    assert entry.pieces == (sha256(content[:PIECE_BYTES]).hexdigest(), sha256(b"and a bit").hexdigest())
    assert read.path.joinpath("weights.safetensors").read_bytes() == content
    backend = place.reader().backend
    assert backend.read_range(entry, PIECE_BYTES - 2, 5, BLOBS) == content[PIECE_BYTES - 2 :][:5]
    content[5] ^= 1
    place.change_blob(entry.sha256, bytes(content))
    assert backend.read_range(entry, PIECE_BYTES, 9, BLOBS) == b"and a bit"
    with pytest.raises(CorruptArtifactError, match="piece 0"):
        backend.read_range(entry, PIECE_BYTES - 1, 5, BLOBS)
    assert place.reader().get(key) is None


@pytest.mark.parametrize("name", ["v1/blob/../../../escaped", "v1/../../escaped", "../escaped", "/escaped", ""])
def test_name_that_leads_out_of_the_store_is_refused(backend: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / "escaped").write_bytes(b"not the store's")
    for use in (
        lambda: backend.read(name),
        lambda: backend.create(name, b"one"),
        lambda: backend.replace(name, b"two", sha256(b"not the store's").hexdigest()),
        lambda: backend.remove(name),
        lambda: backend.set_aside(name),
    ):
        with pytest.raises(StoreError, match="is no name in a store"):
            use()
    assert (tmp_path / "escaped").read_bytes() == b"not the store's"


OUTSIDE = [
    "v1/quarantine/../../../../../victim",
    "v1/partial/../../../../../victim",
    "v1/blob/../../../../../victim",
    "v1/work/../../../../../victim",
    "v1/work/t0/blob/../../../../../../../victim",
    "v1/blob/aa/",
]


def test_collection_leaves_alone_what_keys_of_others_lead_to(
    bucket_place: Any, s3_client: Any, key: StageKey, build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket, _, prefix = bucket_place.url.removeprefix("s3://").partition("/")
    made = bucket_place.store.get_or_build(key, build)[0].manifest
    root = bucket_place.store.backend.pool.root
    victims = [(root / name).resolve() for name in OUTSIDE if name.endswith("victim")]
    for file in [*victims, root / "v1" / "view" / made.digest / "note"]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"not the store's")
    theirs, ours = [*OUTSIDE, f"v1/quarantine/../view/{made.digest}/note"], ["v1/quarantine/a"]
    for name in [*theirs, *ours]:
        s3_client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"{}")
    with caplog.at_level(logging.WARNING):
        collect(bucket_place.store, keep_last=0, older_than_s=0)
    assert [file.read_bytes() for file in victims] == [b"not the store's"] * len(victims)
    assert set(theirs) <= set(bucket_place.names())
    # Negative control: what had names of the store went.
    assert "v1/quarantine/a" not in bucket_place.names()
    assert "is no name in a store" in caplog.text


def test_only_the_copy_of_a_blob_goes_with_its_object(bucket_place: Any, key: StageKey, build: Build) -> None:
    backend = bucket_place.store.backend
    manifest = bucket_place.store.get_or_build(key, build)[0].manifest
    beside = backend.pool.root / "v1" / "quarantine" / "note"
    beside.parent.mkdir(parents=True)
    beside.write_bytes(b"not in the bucket")
    backend.create("v1/quarantine/note", b"in the bucket")
    assert backend.remove("v1/quarantine/note")
    assert beside.exists()
    sha256_ = manifest.files["config.json"].sha256
    assert backend.pool.path(sha256_).exists()
    assert backend.remove(blob_name(sha256_))
    assert not backend.pool.path(sha256_).exists()
