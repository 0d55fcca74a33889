"""A network and a server that fail: every operation ends right, or with a StoreError that says why, in bounded time."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from qlora_core.errors import StoreError, StoreUnavailableError

AREA = "v1/blob"
FILES = {f"file{number}.json": random.Random(number).randbytes(40_000 * number) for number in range(1, 9)}
IMPATIENT: dict[str, float] = {"connect_timeout_s": 0.5, "read_timeout_s": 0.4, "deadline_s": 5}


def ends_in_time(work: Callable[[], Any], limit_s: float) -> Any:
    """The result of `work`, or the StoreError it ends with; anything else, or later, is a failure."""
    started = time.monotonic()
    try:
        return work()
    except StoreError as error:
        return error
    finally:
        assert time.monotonic() - started < limit_s


@pytest.mark.parametrize("seed", range(2))
def test_one_request_in_five_fails_and_everything_ends_right(place: Any, send: Any, seed: int) -> None:
    proxy = place.behind_proxy()
    proxy.stall_s = 0.6
    proxy.fail_at_random(seed, one_in=5)
    producer, consumer = place.machine(**IMPATIENT), place.machine(**IMPATIENT)
    entries = send(producer, FILES)
    consumer.fetch(entries.values(), AREA)
    for path, entry in entries.items():
        assert consumer.pool.path(entry.sha256).read_bytes() == FILES[path]
    tag = None
    for number in range(20):
        data = f"write {number}".encode()
        tag = consumer.replace("v1/pin/x.json", data, tag) if tag else consumer.create("v1/pin/x.json", data)
        assert tag is not None
        found = producer.read("v1/pin/x.json")
        assert (found.data, found.tag) == (data, tag)
    assert producer.remove("v1/pin/x.json", tag)
    assert {producer.blob_fault(entry, AREA) for entry in entries.values()} == {None}
    assert len(list(producer.list("v1/blob/"))) == len(FILES)
    # Negative control: the faults were there.
    injected = [request.fault for request in proxy.log if request.fault]
    assert len(injected) >= len(proxy.log) // 5 > 10
    assert set(injected) == {"503", "reset", "lost", "cut", "stall"}


def test_large_blob_goes_both_ways_over_a_failing_network(place: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(9).randbytes(4 * small_pieces + 5)
    proxy = place.behind_proxy()
    proxy.stall_s = 0.6
    proxy.fail_at_random(0, one_in=3)
    [entry] = send(
        place.machine(
            **IMPATIENT,
        ),
        {"weights.safetensors": content},
    ).values()
    other = place.machine(**IMPATIENT)
    other.fetch([entry], AREA)
    assert other.pool.path(entry.sha256).read_bytes() == content
    assert place.uploads() == []
    assert len([request for request in proxy.log if request.fault]) > 3


@pytest.mark.parametrize("fault", ["503", "reset", "hang"])
def test_nothing_but_failure_is_an_error_in_bounded_time(moto: Any, send: Any, fault: str) -> None:
    entries = send(moto.machine(), FILES)
    record = moto.machine().create("v1/pin/x.json", b"{}")
    proxy = moto.behind_proxy()
    entry = entries["file1.json"]

    def operations(bucket: Any) -> dict[str, Callable[[], object]]:
        return {
            "read": lambda: bucket.read("v1/pin/x.json"),
            "create": lambda: bucket.create("v1/pin/y.json", b"{}"),
            "replace": lambda: bucket.replace("v1/pin/x.json", b"[]", record),
            "remove": lambda: bucket.remove("v1/pin/x.json"),
            "list": lambda: list(bucket.list("v1/pin/")),
            "fetch": lambda: bucket.fetch(entries.values(), AREA),
            "send": lambda: send(bucket, {"new.json": b"[3]"}),
            "read_range": lambda: bucket.read_range(entry, 0, 1, AREA),
            "blob_fault": lambda: bucket.blob_fault(entry, AREA),
            "set_aside": lambda: bucket.set_aside("v1/pin/x.json"),
            "check": bucket.check,
        }

    proxy.plan = lambda *request: fault
    for name, operation in operations(moto.machine(connect_timeout_s=0.2, read_timeout_s=0.2, deadline_s=0.3)).items():
        ended = ends_in_time(operation, 2)
        assert isinstance(ended, StoreUnavailableError), (name, ended)
        assert proxy.url in str(ended), name
    # Negative control: it was the failures and nothing else. Not as impatient, since a busy machine is slow at times.
    proxy.plan = lambda *request: None
    for name, operation in operations(moto.machine()).items():
        assert not isinstance(ends_in_time(operation, 30), StoreError), name


def test_answer_that_drips_is_given_up(place: Any, send: Any) -> None:
    entries = send(place.machine(), FILES)
    proxy = place.behind_proxy()
    proxy.plan = lambda *request: "drip"
    bucket = place.machine(connect_timeout_s=0.3, read_timeout_s=0.3, deadline_s=1)
    ended = ends_in_time(lambda: bucket.fetch(entries.values(), AREA), 4)
    assert isinstance(ended, StoreUnavailableError)


def test_broken_body_is_continued_where_it_broke(place: Any, send: Any) -> None:
    content = random.Random(10).randbytes(1_000_000)
    [entry] = send(place.machine(), {"weights.safetensors": content}).values()
    proxy = place.behind_proxy()
    proxy.fail_once("GET", "cut")
    other = place.machine()
    other.fetch([entry], AREA)
    assert other.pool.path(entry.sha256).read_bytes() == content
    assert [request.headers.get("Range") for request in proxy.log] == [None, "bytes=500000-999999"]


def test_full_server_is_named_and_the_next_try_succeeds(place: Any, send: Any) -> None:
    proxy = place.behind_proxy()
    proxy.fail_once("PUT", "507", times=99)
    bucket = place.machine()
    with pytest.raises(StoreError, match=rf"{proxy.url}.*XMinioStorageFull.*on purpose"):
        send(bucket, FILES)
    assert place.names() == []
    proxy.plan = lambda *request: None
    send(bucket, FILES)
    assert len(place.names()) == len(FILES)


def test_body_damaged_on_its_way_is_refused_by_a_strict_server(ministack: Any, send: Any) -> None:
    bucket = ministack.machine(deadline_s=0.3)
    with bucket.staging() as folder:
        (folder / "a.json").write_bytes(b"{}")
        entry = next(iter(send(ministack.machine(), {"b.json": b"[]"}).values()))
        with pytest.raises(StoreError, match="do not have their digest"):
            bucket.send(folder, {"a.json": entry.model_copy(update={"sha256": "0" * 64})}, AREA)
    assert len(ministack.names()) == 1
