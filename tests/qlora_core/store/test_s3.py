"""What only a bucket can suffer: wrong credentials, absent servers, servers that lie, spoiled downloads, old copies."""

import logging
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.s3 import S3Bucket
from qlora_core.store.store import Store, open_store

Build = Callable[[Path], None]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def strict_credentials(bucket_place: Any, s3_endpoint: str) -> Iterator[None]:
    """For one test the server checks who is asking."""

    def reset(unchecked_requests: str) -> None:
        url, headers = f"{s3_endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        with urllib.request.urlopen(urllib.request.Request(url, unchecked_requests.encode(), headers, method="POST")):
            pass

    reset("0")
    yield
    reset("inf")


def test_wrong_credentials_name_bucket_and_source_but_no_secret(
    bucket_place: Any, strict_credentials: None, key: StageKey, build: Build
) -> None:
    store = bucket_place.reader()
    for use in (store.check, lambda: store.find(key), lambda: store.get_or_build(key, build)):
        with pytest.raises(StoreError) as caught:
            use()
        message = str(caught.value)
        assert bucket_place.url in message
        assert "the environment (AWS_ACCESS_KEY_ID)" in message
        assert "InvalidAccessKeyId" in message
        assert "s3:PutObject" in message
        assert "example-secret" not in message


def test_no_credentials_at_all_says_what_to_set(bucket_place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match=r"s3://.*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        bucket_place.reader().check()


def test_unknown_profile_is_named(bucket_place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nightly-typo")
    with pytest.raises(StoreError, match=r"nightly-typo.*AWS_PROFILE"):
        bucket_place.reader().check()


def test_missing_bucket_is_named_with_the_next_step(
    s3_client: Any, tmp_path: Path, key: StageKey, build: Build
) -> None:
    store = open_store("s3://no-such-bucket/x", tmp_path / "cache")
    for use in (store.check, lambda: store.find(key), lambda: store.get_or_build(key, build)):
        with pytest.raises(StoreError, match=r"there is no bucket 'no-such-bucket'; create it"):
            use()


def test_impossible_bucket_name_is_a_store_error(s3_client: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="mend `store`"):
        open_store("s3://no such bucket/x", tmp_path / "cache").check()


def test_endpoint_that_refuses_connections_fails_soon_and_is_named(
    bucket_place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    started = time.monotonic()
    with pytest.raises(StoreError, match=rf"{url}.*check AWS_ENDPOINT_URL"):
        bucket_place.reader().check()
    assert time.monotonic() - started < 20


def test_endpoint_that_never_answers_fails_in_bounded_time(
    bucket_place: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        backend = S3Bucket("bucket", "x", tmp_path, connect_timeout_s=0.2, read_timeout_s=0.2)
        started = time.monotonic()
        with pytest.raises(StoreError, match="Read timeout"):
            backend.check()
        assert time.monotonic() - started < 20


def test_endpoint_that_is_no_url_is_named(bucket_place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    with pytest.raises(StoreError, match=r"minio:9000.*mend AWS_ENDPOINT_URL"):
        bucket_place.reader().check()


def test_server_that_ignores_conditions_is_refused_by_name(bucket_place: Any, misbehaving: Any) -> None:
    bucket_place.reader().check()
    misbehaving.ignores_conditions = True
    with pytest.raises(StoreError, match=rf"{misbehaving.url}.*If-None-Match"):
        bucket_place.reader().check()
    assert bucket_place.names() == []


def test_conflict_while_writing_the_manifest_is_tried_again(
    bucket_place: Any, misbehaving: Any, key: StageKey, build: Build
) -> None:
    misbehaving.conflicts = 2
    _, cached = bucket_place.reader().get_or_build(key, build)
    assert not cached
    assert misbehaving.conflicts == 0
    assert bucket_place.reader().get(key) is not None


def test_conflict_without_end_is_an_error_and_no_artifact(
    bucket_place: Any, misbehaving: Any, key: StageKey, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    misbehaving.conflicts = 1000
    with pytest.raises(StoreError, match="being written by others"):
        bucket_place.reader().get_or_build(key, build)
    misbehaving.conflicts = 0
    assert bucket_place.store.find(key) is None


def test_server_whose_disk_is_full_is_named_and_leaves_no_artifact(
    bucket_place: Any, misbehaving: Any, key: StageKey, build: Build
) -> None:
    misbehaving.failing_uploads = True
    store = bucket_place.reader()
    with pytest.raises(StoreError, match=rf"{misbehaving.url}.*XMinioStorageFull.*the drive is full"):
        store.get_or_build(key, build)
    assert bucket_place.names() == []
    misbehaving.failing_uploads = False
    _, cached = store.get_or_build(key, build)
    assert not cached


def test_download_spoiled_once_on_the_way_is_fetched_again(
    bucket_place: Any, misbehaving: Any, key: StageKey, build: Build, files: dict[str, bytes]
) -> None:
    bucket_place.store.get_or_build(key, build)
    misbehaving.spoiled_downloads = 1
    artifact = bucket_place.reader().get(key)
    assert misbehaving.spoiled_downloads == 0
    assert artifact is not None
    assert contents(artifact.path) == files


def test_sound_local_copy_is_used_without_a_download(
    bucket_place: Any, key: StageKey, build: Build, files: dict[str, bytes]
) -> None:
    bucket_place.store.get_or_build(key, build)
    for path in files:
        bucket_place.change(path, None)
    assert bucket_place.store.get(key) is not None
    # Negative control: without the copy the same bucket is a miss.
    assert bucket_place.reader().get(key) is None


def test_damaged_local_copy_is_named_and_fetched_again(
    bucket_place: Any, key: StageKey, build: Build, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    artifact, _ = bucket_place.store.get_or_build(key, build)
    (artifact.path / "config.json").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        again = bucket_place.store.get(key)
    assert again is not None
    assert contents(again.path) == files
    assert "config.json: expected sha256" in caplog.text
    assert not any(name.startswith("v1/quarantine") for name in bucket_place.names())


def test_local_copy_of_an_older_artifact_gives_way(bucket_place: Any, key: StageKey, s3_client: Any) -> None:
    def build(folder: Path, text: str) -> None:
        (folder / "result.json").write_text(text)

    old, _ = bucket_place.store.get_or_build(key, lambda folder: build(folder, "old"))
    bucket = bucket_place.url.split("/")[2]
    s3_client.delete_object(Bucket=bucket, Key=f"team/models/{key.address}/manifest.json")
    new, _ = bucket_place.reader().get_or_build(key, lambda folder: build(folder, "new"))
    read = bucket_place.store.get(key)
    assert read is not None
    assert old.digest != new.digest == read.digest
    assert (read.path / "result.json").read_text() == "new"


def test_equal_files_are_stored_once_and_known_ones_are_not_sent_again(
    bucket_place: Any, key: StageKey, misbehaving: Any
) -> None:
    def twins(folder: Path) -> None:
        (folder / "a.json").write_text("{}")
        (folder / "b.json").write_text("{}")

    store = bucket_place.reader()
    artifact, _ = store.get_or_build(key, twins)
    assert misbehaving.blobs_received == 1
    store.get_or_build(StageKey("curate", "1", {}, {}), twins)
    assert misbehaving.blobs_received == 1
    assert len([name for name in bucket_place.names() if name.startswith("v1/blob/")]) == 1
    assert set(contents(artifact.path)) == {"a.json", "b.json"}


def test_large_file_goes_up_in_parts_and_comes_back_whole(
    bucket_place: Any, key: StageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = (5 << 20) + 17
    monkeypatch.setattr("qlora_core.store.s3._TRANSFER.multipart_threshold", 5 << 20)
    monkeypatch.setattr("qlora_core.store.s3._TRANSFER.multipart_chunksize", 5 << 20)

    def build(folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(bytes(range(251)) * (size_bytes // 251))

    built, _ = bucket_place.store.get_or_build(key, build)
    read = bucket_place.reader().get(key)
    assert read is not None
    assert read.digest == built.digest


def test_two_prefixes_of_one_bucket_are_two_stores(bucket_place: Any, key: StageKey, build: Build) -> None:
    bucket_place.store.get_or_build(key, build)
    other: Store = open_store(bucket_place.url.rsplit("/", 1)[0] + "/other", bucket_place.newest_cache)
    assert other.find(key) is None
