"""Records in a bucket: what keeps writers apart, on servers that honour conditions and on those that do not."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import StoreError, StoreUnavailableError
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.bucket import S3Bucket

NAME = "v1/lease/stage/train/abc.json"


def test_record_is_created_once_and_replaced_only_by_who_knows_it(place: Any) -> None:
    ours, theirs = place.machine(), place.machine()
    assert ours.read(NAME) is None
    first = ours.create(NAME, b"one")
    assert first is not None
    assert theirs.create(NAME, b"two") is None
    second = ours.replace(NAME, b"three", first)
    assert second is not None
    assert theirs.replace(NAME, b"four", first) is None
    found = theirs.read(NAME)
    assert found is not None
    assert (found.data, found.tag) == (b"three", second)


def test_replacing_what_was_removed_is_refused(place: Any) -> None:
    bucket = place.machine()
    tag = bucket.create(NAME, b"one")
    assert bucket.remove(NAME)
    assert bucket.replace(NAME, b"two", tag) is None
    assert bucket.read(NAME) is None


def test_record_is_removed_only_as_it_was_known(place: Any) -> None:
    bucket = place.machine()
    stale = bucket.create(NAME, b"one")
    tag = bucket.replace(NAME, b"two", stale)
    assert bucket.remove(NAME, stale) is False
    assert bucket.read(NAME) is not None
    assert bucket.remove(NAME, tag) is True
    assert bucket.remove(NAME, tag) is False
    assert bucket.remove(NAME) is False


def test_listing_is_sorted_complete_and_relative(place: Any) -> None:
    bucket = place.machine()
    for number in (3, 1, 2):
        bucket.create(f"v1/pin/p{number}.json", b"x" * number)
    bucket.create("v1/pinned/other.json", b"")
    listed = list(bucket.list("v1/pin/"))
    assert [(one.name, one.size_bytes) for one in listed] == [(f"v1/pin/p{n}.json", n) for n in (1, 2, 3)]
    assert all(one.modified.tzinfo for one in listed)
    assert list(bucket.list("v1/ref/")) == []


def test_listing_goes_over_pages(place: Any) -> None:
    proxy = place.behind_proxy()
    proxy.added_to_listings = "max-keys=2"
    bucket = place.machine()
    for number in range(5):
        bucket.create(f"v1/verdict/{number}", b"{}")
    assert [one.name for one in bucket.list("v1/verdict/")] == [f"v1/verdict/{number}" for number in range(5)]
    assert len(proxy.seen("GET")) == 3


def test_of_sixteen_creators_one_wins(place: Any) -> None:
    machines = [place.machine() for _ in range(16)]
    ready, tags = threading.Barrier(16), {}

    def create(number: int) -> None:
        ready.wait()
        tags[number] = machines[number].create(NAME, f"by {number}".encode())

    _together(create, 16)
    winners = [number for number, tag in tags.items() if tag]
    assert len(winners) == 1
    assert machines[0].read(NAME).data == f"by {winners[0]}".encode()


def test_of_sixteen_replacers_one_wins(place: Any) -> None:
    machines = [place.machine() for _ in range(16)]
    tag = machines[0].create(NAME, b"expired")
    ready, tags = threading.Barrier(16), {}

    def take_over(number: int) -> None:
        ready.wait()
        tags[number] = machines[number].replace(NAME, f"by {number}".encode(), tag)

    _together(take_over, 16)
    assert len([tag for tag in tags.values() if tag]) == 1


@pytest.mark.parametrize("fault", ["lost", "503", "reset", "409"])
def test_write_is_ours_whatever_became_of_the_answer(place: Any, fault: str) -> None:
    proxy = place.behind_proxy()
    bucket = place.machine()
    proxy.fail_once("PUT", fault)
    tag = bucket.create(NAME, b"one")
    assert tag is not None
    assert len(proxy.seen("PUT")) == 2
    proxy.fail_once("PUT", fault)
    tag = bucket.replace(NAME, b"two", tag)
    assert tag is not None
    assert len(proxy.seen("PUT")) == 4
    found = bucket.read(NAME)
    assert (found.data, found.tag) == (b"two", tag)
    proxy.fail_once("DELETE", fault)
    assert bucket.remove(NAME, tag) is True


def test_lost_answer_does_not_make_a_loser_the_winner(place: Any) -> None:
    place.machine().create(NAME, b"theirs")
    proxy = place.behind_proxy()
    bucket = place.machine()
    proxy.fail_once("PUT", "lost")
    assert bucket.create(NAME, b"ours") is None
    proxy.fail_once("PUT", "lost")
    assert bucket.replace(NAME, b"ours", '"5d41402abc4b2a76b9719d911017c592"') is None
    assert bucket.read(NAME).data == b"theirs"


def test_conflict_without_end_is_an_error(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = place.behind_proxy()
    proxy.fail_once("PUT", "409", times=1000)
    with pytest.raises(StoreUnavailableError, match="being written by others"):
        place.machine(deadline_s=1).create(NAME, b"one")
    assert place.names() == []


def test_reading_a_record_is_one_request(place: Any) -> None:
    place.machine().create(NAME, b"one")
    proxy = place.behind_proxy()
    bucket = place.machine()
    assert bucket.read(NAME).data == b"one"
    assert bucket.read("v1/pin/none.json") is None
    assert [request.method for request in proxy.log] == ["GET", "GET"]


def test_check_passes_and_leaves_nothing_behind(place: Any) -> None:
    place.machine().check()
    assert place.names() == []


def test_server_that_ignores_conditions_is_refused_by_name(
    rclone_url: tuple[str, Path], aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, folder = rclone_url
    (folder / "artifacts").mkdir()
    aws.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(StoreError, match=rf"{url} ignores the header `If-None-Match: \*`.*or a folder as store"):
        S3Bucket("artifacts", "team", BlobPool(tmp_path / "pool")).check()
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("ignored", "named"), [("If-None-Match", r"If-None-Match: \*"), ("If-Match", "If-Match")])
def test_either_condition_that_is_ignored_is_named(place: Any, ignored: str, named: str) -> None:
    proxy = place.behind_proxy()
    proxy.dropped_header = ignored
    with pytest.raises(StoreError, match=f"ignores the header `{named}`"):
        place.machine().check()
    assert place.names() == []


def test_probe_is_removed_even_if_the_check_fails(place: Any) -> None:
    proxy = place.behind_proxy()
    proxy.fail_once("GET", "spoil", part_of_key="/v1/probe/", times=9)
    with pytest.raises(StoreError, match="other bytes"):
        place.machine().check()
    assert place.names() == []


def _together(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
