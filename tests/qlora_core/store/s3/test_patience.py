"""When an operation goes on and when it ends: bytes that get further count, bytes that are sent again do not."""

import time
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import StoreError, StoreUnavailableError
from qlora_core.store.s3.body import FileSlice
from qlora_core.store.s3.patience import Patience


def test_bytes_that_move_keep_an_operation_alive() -> None:
    patience = Patience(deadline_s=0.2, attempts=99)
    for _ in range(4):
        time.sleep(0.1)
        patience.moved()
    assert not patience.is_out
    time.sleep(0.25)
    assert patience.is_out
    assert not patience.pause(1)


def test_tries_are_counted_and_waiting_ends_with_the_deadline() -> None:
    assert Patience(deadline_s=9, attempts=2).pause(1)
    assert not Patience(deadline_s=9, attempts=2).pause(2)
    started = time.monotonic()
    assert not Patience(deadline_s=0.1, attempts=99).pause(20)
    assert time.monotonic() - started < 0.5


def test_giving_up_ends_a_pause() -> None:
    patience = Patience(deadline_s=9, attempts=99)
    patience.give_up()
    started = time.monotonic()
    assert not patience.pause(20)
    assert time.monotonic() - started < 0.5


def test_slice_of_a_file_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 4096)
    with FileSlice(file, 1000, 700_000, Patience(9, 9)) as body:
        first = b"".join(iter(lambda: body.read(16_384), b""))
        body.rewind()
        assert first == body.read() == file.read_bytes()[1000:701_000]
        assert body.seek(0, 2) == 700_000


def test_bytes_sent_again_are_no_progress(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1_000_000))
    patience = Patience(deadline_s=0.3, attempts=9)
    with FileSlice(file, 0, 1_000_000, patience) as body, pytest.raises(TimeoutError):
        for _ in range(9):
            body.rewind()
            body.read(1)
            body.read(1)
            time.sleep(0.1)


def test_file_that_cannot_be_read_is_named_and_not_tried_again(moto: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*/none\.json"):
        FileSlice(tmp_path / "none.json", 0, 1, Patience(9, 9))
    folder = tmp_path / "folder"
    folder.mkdir()
    with FileSlice(folder, 0, 10, Patience(9, 9)) as body:
        with pytest.raises(IsADirectoryError):
            body.read(1)
        with pytest.raises(StoreError, match="look at that disk"):
            body.rewind()


def test_server_that_swallows_a_large_upload_without_an_answer(moto: Any, send: Any, small_pieces: int) -> None:
    proxy = moto.behind_proxy()
    proxy.plan = lambda method, key, query: "hang" if "partNumber" in query else None
    bucket = moto.machine(connect_timeout_s=0.3, read_timeout_s=0.3, deadline_s=0.8)
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="Read timeout"):
        send(bucket, {"weights.safetensors": bytes(3 * small_pieces)})
    assert time.monotonic() - started < 4
