"""Blobs to a bucket and back: what is sent and fetched, what is not, and what becomes of what is wrong there."""

import hashlib
import logging
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import CorruptArtifactError, StoreError
from qlora_core.store.contents import seal
from qlora_core.store.manifest import FileEntry
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.bucket import S3Bucket

AREA = "v1/blob"
FILES = {
    "model.safetensors": b"weights, as far as the store can tell " * 200,
    "config.json": b'{"hidden_size": 64}\n',
    "tokenizer/merges.txt": b"",
}


def content_of(bucket: Any, entry: FileEntry) -> bytes:
    return bucket.pool.path(entry.sha256).read_bytes()


def partial_files(bucket: Any) -> list[Path]:
    return list((bucket.pool.root / "v1" / "partial").glob("*"))


def test_files_arrive_on_another_machine(place: Any, send: Any) -> None:
    entries = send(place.machine(), FILES)
    other = place.machine()
    other.fetch(entries.values(), AREA)
    assert {path: content_of(other, entry) for path, entry in entries.items()} == FILES
    assert partial_files(other) == []
    assert {other.blob_fault(entry, AREA) for entry in entries.values()} == {None}


def test_producer_and_second_fetch_need_no_request(place: Any, send: Any) -> None:
    proxy = place.behind_proxy()
    producer, other = place.machine(), place.machine()
    entries = send(producer, FILES)
    other.fetch(entries.values(), AREA)
    before = len(proxy.log)
    producer.fetch(entries.values(), AREA)
    other.fetch(entries.values(), AREA)
    assert len(proxy.log) == before


def test_equal_files_are_sent_once_and_known_ones_not_again(place: Any, send: Any) -> None:
    proxy = place.behind_proxy()
    send(place.machine(), {"a.json": b"{}", "b.json": b"{}"})
    assert len(proxy.seen("PUT")) == 1
    send(place.machine(), {"c.json": b"{}", "d.json": b"[]"})
    assert len(proxy.seen("PUT")) == 2
    assert len(place.names()) == 2


def test_blob_of_another_size_is_sent_anew(place: Any, send: Any) -> None:
    entries = send(place.machine(), {"a.json": b"[1, 2]"})
    place.overwrite(entries["a.json"], b"[1")
    send(place.machine(), {"a.json": b"[1, 2]"})
    assert place.machine().blob_fault(entries["a.json"], AREA) is None


def test_large_file_goes_up_and_down_in_pieces(place: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(0).randbytes(3 * small_pieces - 17)
    proxy = place.behind_proxy()
    entries = send(place.machine(), {"weights.safetensors": content, "small.json": b"{}"})
    assert len([request for request in proxy.log if request.is_part]) == 3
    assert place.uploads() == []
    other = place.machine()
    other.fetch(entries.values(), AREA)
    assert content_of(other, entries["weights.safetensors"]) == content
    ranges = {request.headers.get("Range") for request in proxy.seen("GET", entries["weights.safetensors"].sha256)}
    assert len(ranges) == 3
    assert partial_files(other) == []


def test_memory_does_not_grow_with_the_file(ministack: Any, small_pieces: int) -> None:
    bucket, content = ministack.machine(), random.Random(1).randbytes(6 * small_pieces)
    other = ministack.machine()
    with bucket.staging() as folder:
        (folder / "weights.safetensors").write_bytes(content)
        entries = seal(folder)
        tracemalloc.start()
        bucket.send(folder, entries, AREA)
        _, sending = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        other.fetch(entries.values(), AREA)
        _, fetching = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert max(sending, fetching) < 2 * small_pieces


def test_range_costs_only_its_pieces(place: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(2).randbytes(3 * small_pieces - 17)
    [entry] = send(place.machine(), {"weights.safetensors": content}).values()
    proxy = place.behind_proxy()
    other = place.machine()
    assert other.read_range(entry, small_pieces + 3, 100, AREA) == content[small_pieces + 3 :][:100]
    across = slice(2 * small_pieces - 5, 2 * small_pieces + 5)
    assert other.read_range(entry, across.start, 10, AREA) == content[across]
    assert [request.headers["Range"] for request in proxy.log] == [
        f"bytes={small_pieces}-{2 * small_pieces - 1}",
        f"bytes={small_pieces}-{len(content) - 1}",
    ]
    other.fetch([entry], AREA)
    before = len(proxy.log)
    assert other.read_range(entry, 7, 5, AREA) == content[7:12]
    assert len(proxy.log) == before
    with pytest.raises(StoreError, match="not inside blob"):
        other.read_range(entry, len(content) - 1, 2, AREA)


def test_range_of_a_short_file(place: Any, send: Any) -> None:
    entries = send(place.machine(), FILES)
    other = place.machine()
    assert other.read_range(entries["config.json"], 2, 6, AREA) == b"hidden"
    assert other.read_range(entries["tokenizer/merges.txt"], 0, 0, AREA) == b""


def test_wrong_piece_is_named_when_a_range_is_read(place: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(3).randbytes(2 * small_pieces)
    [entry] = send(place.machine(), {"weights.safetensors": content}).values()
    place.overwrite(entry, content[:-1] + bytes([content[-1] ^ 1]))
    other = place.machine()
    assert other.read_range(entry, 0, 10, AREA) == content[:10]
    with pytest.raises(CorruptArtifactError, match=f"blob {entry.sha256}: piece 1 has sha256"):
        other.read_range(entry, small_pieces, 10, AREA)
    place.client.delete_object(Bucket=place.bucket, Key=place.key(entry))
    with pytest.raises(CorruptArtifactError, match=f"blob {entry.sha256} is missing"):
        other.read_range(entry, 0, 10, AREA)


@pytest.mark.parametrize("damage", ["changed", "cut", "longer"])
def test_wrong_blob_is_named_and_moved_to_quarantine(place: Any, send: Any, damage: str) -> None:
    entries = send(place.machine(), FILES)
    entry, content = entries["model.safetensors"], FILES["model.safetensors"]
    wrong = {"changed": b"W" + content[1:], "cut": content[:-1], "longer": content + b"!"}[damage]
    place.overwrite(entry, wrong)
    other = place.machine()
    assert f"expected sha256 {entry.sha256}" in other.blob_fault(entry, AREA)
    found = hashlib.sha256(wrong).hexdigest()
    words = rf"blob {entry.sha256}: expected sha256 {entry.sha256} .* found sha256 {found} \({len(wrong)} bytes\)"
    with pytest.raises(CorruptArtifactError, match=words):
        other.fetch(entries.values(), AREA)
    assert not other.pool.path(entry.sha256).exists()
    assert content_of(other, entries["config.json"]) == FILES["config.json"]
    assert [key for key in place.names() if entry.sha256 in key] == [
        key for key in place.names() if key.startswith("v1/quarantine/blob/")
    ]
    # Set aside, it is a miss, and sent anew by whoever has it.
    with pytest.raises(CorruptArtifactError, match=f"blob {entry.sha256} is missing"):
        other.fetch(entries.values(), AREA)
    send(place.machine(), FILES)
    other.fetch(entries.values(), AREA)
    assert content_of(other, entry) == content


def test_wrong_large_blob_is_named_and_moved_to_quarantine(place: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(4).randbytes(2 * small_pieces + 1)
    [entry] = send(place.machine(), {"weights.safetensors": content}).values()
    place.overwrite(entry, content[:-1] + bytes([content[-1] ^ 1]))
    other = place.machine()
    with pytest.raises(CorruptArtifactError, match=f"blob {entry.sha256}: expected .* found sha256"):
        other.fetch([entry], AREA)
    assert [key.startswith("v1/quarantine/blob/") for key in place.names()] == [True]


def test_missing_blobs_are_all_named(place: Any, send: Any) -> None:
    entries = send(place.machine(), FILES)
    for path in ("model.safetensors", "config.json"):
        place.client.delete_object(Bucket=place.bucket, Key=place.key(entries[path]))
    with pytest.raises(CorruptArtifactError) as caught:
        place.machine().fetch(entries.values(), AREA)
    for path in ("model.safetensors", "config.json"):
        assert f"blob {entries[path].sha256} is missing" in str(caught.value)


def test_blob_spoiled_on_the_way_is_fetched_again(place: Any, send: Any) -> None:
    entries = send(place.machine(), FILES)
    proxy = place.behind_proxy()
    proxy.fail_once("GET", "spoil", part_of_key=entries["model.safetensors"].sha256)
    other = place.machine()
    other.fetch(entries.values(), AREA)
    assert content_of(other, entries["model.safetensors"]) == FILES["model.safetensors"]
    assert not any(key.startswith("v1/quarantine") for key in place.names())


def test_wrong_blob_that_may_not_be_moved_is_named_all_the_same(
    place: Any, send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    entries = send(place.machine(), FILES)
    entry = entries["config.json"]
    place.overwrite(entry, b"{}")
    proxy = place.behind_proxy()
    proxy.fail_once("PUT", "403", part_of_key="/v1/quarantine/")
    with caplog.at_level(logging.WARNING), pytest.raises(CorruptArtifactError, match=entry.sha256):
        place.machine().fetch(entries.values(), AREA)
    assert "AccessDenied" in caplog.text
    assert "stays where it is" in caplog.text


def test_damaged_copy_is_fetched_anew(place: Any, send: Any, caplog: pytest.LogCaptureFixture) -> None:
    bucket = place.machine()
    entries = send(bucket, FILES)
    copy = bucket.pool.path(entries["config.json"].sha256)
    copy.chmod(0o644)
    copy.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        bucket.fetch(entries.values(), AREA)
    assert copy.read_bytes() == FILES["config.json"]
    assert "is damaged and fetched anew" in caplog.text
    assert not any(key.startswith("v1/quarantine") for key in place.names())


def test_set_aside_makes_a_record_a_miss(place: Any) -> None:
    bucket = place.machine()
    bucket.create("v1/stage/curate/abc/manifest.json", b"broken")
    bucket.set_aside("v1/stage/curate/abc/manifest.json")
    bucket.set_aside("v1/stage/curate/none/manifest.json")
    assert bucket.read("v1/stage/curate/abc/manifest.json") is None
    [kept] = place.names()
    assert kept.startswith("v1/quarantine/stage/curate/abc/manifest.json-")


def test_removed_blob_is_gone_here_and_there(place: Any, send: Any) -> None:
    bucket = place.machine()
    [entry] = send(bucket, {"a.json": b"{}"}).values()
    name = f"v1/blob/{entry.sha256[:2]}/{entry.sha256}"
    assert bucket.remove(name)
    assert place.names() == []
    assert not bucket.pool.path(entry.sha256).exists()


def test_copies_keep_their_limit(place: Any, send: Any, tmp_path: Path) -> None:
    entries = send(place.machine(), {"a.json": b"a" * 600, "b.json": b"b" * 600})
    bucket = S3Bucket(place.bucket, "team/models", BlobPool(tmp_path / "pool", limit_bytes=1000))
    bucket.fetch([entries["a.json"]], AREA)
    bucket.fetch([entries["b.json"]], AREA)
    assert not bucket.pool.path(entries["a.json"].sha256).exists()
    assert bucket.pool.path(entries["b.json"].sha256).exists()


def test_two_who_fetch_the_same_blob_share_one_download(place: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(5).randbytes(3 * small_pieces)
    [entry] = send(place.machine(), {"weights.safetensors": content}).values()
    proxy = place.behind_proxy()
    proxy.stall_s = 0.5
    proxy.fail_once("GET", "stall", times=3)
    one = place.machine()
    two = S3Bucket(place.bucket, "team/models", BlobPool(one.pool.root))
    threads = [threading.Thread(target=bucket.fetch, args=([entry], AREA)) for bucket in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content_of(one, entry) == content
    # Three pieces, each broken once and continued.
    assert len(proxy.seen("GET")) == 6
    assert partial_files(one) == []


@pytest.mark.parametrize(("encryption", "kms_key_id"), [("AES256", None), ("aws:kms", "alias/artifacts")])
def test_encryption_is_asked_of_the_server_for_everything(
    moto: Any, send: Any, small_pieces: int, encryption: str, kms_key_id: str | None
) -> None:
    bucket = moto.machine(encryption=encryption, kms_key_id=kms_key_id)
    bucket.check()
    bucket.create("v1/pin/best.json", b"{}")
    entries = send(bucket, {"a.json": b"{}", "weights.safetensors": bytes(2 * small_pieces)})
    moto.overwrite(entries["a.json"], b"wrong")
    with pytest.raises(CorruptArtifactError):
        moto.machine(encryption=encryption, kms_key_id=kms_key_id).fetch(entries.values(), AREA)
    keys = moto.names()
    assert len(keys) == 3
    for key in keys:
        head = moto.client.head_object(Bucket=moto.bucket, Key=f"team/models/{key}")
        assert (head.get("ServerSideEncryption"), head.get("SSEKMSKeyId")) == (encryption, kms_key_id), key


def test_two_prefixes_of_one_bucket_are_two_stores(place: Any, send: Any, tmp_path: Path) -> None:
    entries = send(place.machine(), FILES)
    other = S3Bucket(place.bucket, "team/other", BlobPool(tmp_path / "pool"))
    assert list(other.list("v1/blob/")) == []
    with pytest.raises(CorruptArtifactError, match="is missing"):
        other.fetch(entries.values(), AREA)


def test_object_of_the_right_size_and_another_digest_is_sent_anew(
    ministack: Any, send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    content = b"what is to be there"
    entries = send(ministack.machine(), {"a.json": content})
    entry = entries["a.json"]
    ministack.client.put_object(
        Bucket=ministack.bucket, Key=ministack.key(entry), Body=content[::-1], ChecksumAlgorithm="SHA256"
    )
    head = ministack.client.head_object(Bucket=ministack.bucket, Key=ministack.key(entry), ChecksumMode="ENABLED")
    if "ChecksumSHA256" not in head:
        pytest.skip("this server does not tell the digest")
    send(ministack.machine(), {"a.json": content})
    assert "it is sent anew" in caplog.text
    assert ministack.machine().blob_fault(entry, "v1/blob") is None
