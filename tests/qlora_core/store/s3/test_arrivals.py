"""New objects under a prefix are noticed from the listing alone, on a real S3 server."""

from pathlib import Path
from typing import Any

import pytest

from qlora_core.data.arrivals import fingerprint_sources
from qlora_core.errors import DataError
from qlora_core.store.s3.objects import S3Objects


def seen(bucket: str, *sources: str) -> dict[str, str]:
    return fingerprint_sources([f"s3://{bucket}/{source}" for source in sources], Path, S3Objects, _refuse)


def _refuse(path: Path) -> str:
    raise AssertionError(f"{path} was read")


def put(place: Any, key: str, body: bytes) -> None:
    place.client.put_object(Bucket=place.bucket, Key=key, Body=body)


def test_new_changed_and_removed_objects_change_what_is_seen(moto: Any) -> None:
    put(moto, "in/a.jsonl", b'{"n": 1}\n')
    first = seen(moto.bucket, "in")
    assert list(first) == [f"0/s3://{moto.bucket}/in/a.jsonl"]
    assert seen(moto.bucket, "in") == first
    put(moto, "in/notes.txt", b"no data set")
    put(moto, "in2/b.jsonl", b"another folder")
    assert seen(moto.bucket, "in") == first
    put(moto, "in/a.jsonl", b'{"n": 2}\n')
    changed = seen(moto.bucket, "in")
    assert changed.keys() == first.keys() and changed != first
    put(moto, "in/b.jsonl", b'{"n": 3}\n')
    assert len(seen(moto.bucket, "in")) == 2
    moto.client.delete_object(Bucket=moto.bucket, Key="in/b.jsonl")
    assert seen(moto.bucket, "in") == changed


def test_single_object_is_its_own_source_and_a_missing_one_is_named(moto: Any) -> None:
    put(moto, "one/rows.bin", b"1")
    assert len(seen(moto.bucket, "one/rows.bin")) == 1
    with pytest.raises(DataError, match=r"absent.*no such object"):
        seen(moto.bucket, "absent")
