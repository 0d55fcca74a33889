"""Objects of others in a bucket: all listed, fetched whole or not at all, faults in words."""

from pathlib import Path
from typing import Any

import pytest

from qlora_core.data.remote_sources import localize_sources
from qlora_core.data.source_files import list_source_files
from qlora_core.errors import StoreError, StoreUnavailableError
from qlora_core.store.s3.objects import S3Objects


def put(place: Any, objects: dict[str, bytes]) -> None:
    for key, data in objects.items():
        place.client.put_object(Bucket=place.bucket, Key=key, Body=data)


def test_sources_in_a_bucket_become_files(place: Any, tmp_path: Path) -> None:
    put(
        place,
        {"sets/a.jsonl": b"{}\n", "sets/b/c.csv.gz": b"c", "sets/b/": b"", "sets/x.txt": b"x", "setsother.json": b"o"},
    )

    paths = localize_sources([f"s3://{place.bucket}/sets"], tmp_path / "cache", Path, S3Objects)

    files = {file.name: file.path.read_bytes() for file in list_source_files(paths)}
    assert files == {"sets/a.jsonl": b"{}\n", "sets/b/c.csv.gz": b"c"}


def test_listing_goes_on_over_all_pages(moto: Any) -> None:
    put(moto, {f"many/{number}.json": b"" for number in range(7)})
    proxy = moto.behind_proxy()
    proxy.added_to_listings = "max-keys=3"

    assert S3Objects().list(moto.bucket, "many/") == [f"many/{number}.json" for number in range(7)]
    assert len(proxy.seen("GET")) == 3


def test_missing_object_and_missing_bucket_are_named(moto: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")

    with pytest.raises(StoreError, match=rf"s3://{moto.bucket}/gone: there is no such object"):
        S3Objects().fetch(moto.bucket, "gone", tmp_path / "a")
    with pytest.raises(StoreError, match="there is no bucket 'no-such-bucket-here'"):
        S3Objects().list("no-such-bucket-here", "")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_broken_answer_is_continued_to_the_last_byte(moto: Any, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4000
    put(moto, {"rows.json": data})
    moto.behind_proxy().fail_once("GET", "cut", part_of_key="rows.json", times=2)

    S3Objects().fetch(moto.bucket, "rows.json", tmp_path / "rows.json")

    assert (tmp_path / "rows.json").read_bytes() == data


def test_server_that_never_answers_right_leaves_no_file(moto: Any, tmp_path: Path) -> None:
    put(moto, {"rows.json": b"rows"})
    moto.behind_proxy().plan = lambda method, key, query: "cut" if method == "GET" else None
    folder = tmp_path / "out"
    folder.mkdir()

    with pytest.raises(StoreUnavailableError):
        S3Objects(deadline_s=1).fetch(moto.bucket, "rows.json", folder / "rows.json")
    assert list(folder.iterdir()) == []
