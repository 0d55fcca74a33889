"""Processes killed in the middle of a large blob: what they had done is not done again."""

import fcntl
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import StoreUnavailableError
from qlora_core.store.contents import fingerprint
from qlora_core.store.manifest import PIECE_BYTES, FileEntry
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.bucket import S3Bucket

AREA = "v1/blob"
LENGTH = 2 * PIECE_BYTES + 1000
PROGRAM = """
import sys
from pathlib import Path
from qlora_core.store.contents import fingerprint
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.bucket import S3Bucket
what, name, root, file = sys.argv[1:]
bucket = S3Bucket(name, "team/models", BlobPool(Path(root)))
entry = fingerprint(Path(file))
if what == "send":
    bucket.send(Path(file).parent, {Path(file).name: entry}, "v1/blob")
else:
    bucket.fetch([entry], "v1/blob")
"""


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three pieces."""
    file = tmp_path_factory.mktemp("big") / "weights.safetensors"
    file.write_bytes(random.Random(0).randbytes(LENGTH))
    return file


@pytest.fixture(scope="module")
def big_entry(big_file: Path) -> FileEntry:
    return fingerprint(big_file)


def passing_two(wanted: Callable[[str, Any], bool]) -> tuple[Callable[..., str | None], threading.Event]:
    """A plan that passes two of the wanted requests and holds the third for ever; and when it does."""
    seen, holds = [], threading.Event()

    def plan(method: str, key: str, query: Any) -> str | None:
        if not wanted(method, query):
            return None
        seen.append(key)
        if len(seen) <= 2:
            return None
        holds.set()
        return "hang"

    return plan, holds


def kill_in_the_middle(place: Any, proxy: Any, what: str, wanted: Callable[[str, Any], bool], file: Path) -> Path:
    """Run `PROGRAM` in a process of its own until two pieces are through, and kill it; its pool."""
    proxy.plan, holds = passing_two(wanted)
    root = place.scratch / "killed"
    command = [sys.executable, "-c", PROGRAM, what, place.bucket, str(root), str(file)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert holds.wait(30)
    deadline = time.monotonic() + 20
    while len([one for one in proxy.done if wanted(one.method, one.query)]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.wait()
    proxy.plan = lambda *request: None
    proxy.log.clear()
    return root


# Not on ministack, which takes ten seconds for a part of this size; the tests below are.
def test_killed_upload_is_continued(moto: Any, big_file: Path, big_entry: FileEntry, tmp_path: Path) -> None:
    proxy = moto.behind_proxy()
    kill_in_the_middle(moto, proxy, "send", lambda method, query: method == "PUT" and "partNumber" in query, big_file)
    assert len(moto.uploads()) == 1
    assert moto.names() == []
    again = tmp_path / big_file.name
    os.link(big_file, again)
    moto.machine().send(tmp_path, {big_file.name: big_entry}, AREA)
    assert len([request for request in proxy.log if request.is_part]) == 1
    assert moto.uploads() == []
    assert moto.machine().blob_fault(big_entry, AREA) is None


def test_killed_download_is_continued(moto: Any, big_file: Path, big_entry: FileEntry) -> None:
    moto.client.upload_file(str(big_file), moto.bucket, moto.key(big_entry))
    proxy = moto.behind_proxy()
    root = kill_in_the_middle(moto, proxy, "fetch", lambda method, query: method == "GET", big_file)
    partial = root / "v1" / "partial" / big_entry.sha256
    assert partial.exists()
    S3Bucket(moto.bucket, "team/models", BlobPool(root)).fetch([big_entry], AREA)
    assert len(proxy.seen("GET")) == 1
    assert not partial.exists()
    assert (root / "v1/blob" / big_entry.sha256[:2] / big_entry.sha256).stat().st_size == LENGTH


def test_rubbish_in_an_unfinished_download_is_fetched_anew(moto: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(1).randbytes(3 * small_pieces - 1)
    [entry] = send(moto.machine(), {"weights.safetensors": content}).values()
    proxy = moto.behind_proxy()
    other = moto.machine()
    partial = other.pool.root / "v1" / "partial" / entry.sha256
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content[:small_pieces] + bytes(small_pieces) + content[2 * small_pieces :] + b"behind the end")
    other.fetch([entry], AREA)
    assert other.pool.path(entry.sha256).read_bytes() == content
    assert [request.headers["Range"] for request in proxy.log] == [f"bytes={small_pieces}-{2 * small_pieces - 1}"]


def test_part_with_other_bytes_is_sent_again(place: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(2).randbytes(3 * small_pieces)
    [entry] = send(place.machine(), {"weights.safetensors": content}).values()
    key = {"Bucket": place.bucket, "Key": place.key(entry)}
    place.client.delete_object(**key)
    upload_id = place.client.create_multipart_upload(**key, ChecksumAlgorithm="SHA256")["UploadId"]
    for number, data in ((1, content[:small_pieces]), (2, bytes(small_pieces)), (3, content[-small_pieces:])):
        part = {"PartNumber": number, "Body": data, "ChecksumAlgorithm": "SHA256"}
        place.client.upload_part(**key, UploadId=upload_id, **part)
    proxy = place.behind_proxy()
    proxy.added_to_listings = "max-parts=2"
    send(place.machine(), {"weights.safetensors": content})
    assert [request.query["partNumber"] for request in proxy.log if request.is_part] == [["2"]]
    assert place.machine().blob_fault(entry, AREA) is None
    assert place.uploads() == []


def test_upload_that_others_have_finished_is_aborted(place: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(3).randbytes(2 * small_pieces)
    [entry] = send(place.machine(), {"weights.safetensors": content}).values()
    place.client.create_multipart_upload(Bucket=place.bucket, Key=place.key(entry))
    assert len(place.uploads()) == 1
    proxy = place.behind_proxy()
    send(place.machine(), {"weights.safetensors": content})
    assert [request for request in proxy.log if request.is_part] == []
    assert place.uploads() == []


def test_upload_that_is_aborted_by_others_is_begun_anew(ministack: Any, send: Any, small_pieces: int) -> None:
    content = random.Random(4).randbytes(2 * small_pieces)
    proxy = ministack.behind_proxy()

    def abort_all(method: str, key: str, query: Any) -> None:
        if "partNumber" in query and not aborted:
            for upload in ministack.uploads():
                aborted.append(upload["UploadId"])
                ministack.client.abort_multipart_upload(
                    Bucket=ministack.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    aborted: list[str] = []
    proxy.plan = abort_all
    [entry] = send(ministack.machine(), {"weights.safetensors": content}).values()
    assert len(aborted) == 1
    assert ministack.machine().blob_fault(entry, AREA) is None
    assert ministack.uploads() == []


def test_lost_answer_to_the_completion_is_no_failure(place: Any, send: Any, small_pieces: int) -> None:
    proxy = place.behind_proxy()
    lost = []

    def lose_completion(method: str, key: str, query: Any) -> str | None:
        if method == "POST" and "uploadId" in query and not lost:
            lost.append(key)
            return "lost"
        return None

    proxy.plan = lose_completion
    content = random.Random(5).randbytes(2 * small_pieces)
    [entry] = send(place.machine(), {"weights.safetensors": content}).values()
    assert len(lost) == 1
    assert place.machine().blob_fault(entry, AREA) is None
    assert place.uploads() == []


@pytest.mark.parametrize("is_theirs", [lambda query: "partNumber" in query, lambda query: list(query) == ["uploadId"]])
def test_server_that_stumbles_over_an_upload_completed_by_others_is_no_failure(
    moto: Any, send: Any, small_pieces: int, is_theirs: Callable[[Any], bool]
) -> None:
    content = random.Random(7).randbytes(2 * small_pieces)
    other = moto.machine()
    assert other.read("v1/pin/none.json") is None  # it is connected now, and stays so: past the proxy
    proxy = moto.behind_proxy()

    def stumble(method: str, key: str, query: Any) -> str | None:
        if method == "DELETE" or not is_theirs(query):
            return None
        if not stumbled:
            send(other, {"weights.safetensors": content})
        stumbled.append(method)
        return "503"

    stumbled: list[str] = []
    proxy.plan = stumble
    [entry] = send(moto.machine(deadline_s=1), {"weights.safetensors": content}).values()
    assert stumbled
    assert moto.machine().blob_fault(entry, AREA) is None
    assert moto.uploads() == []


def test_server_that_stumbles_over_an_upload_nobody_has_completed_is_named(
    moto: Any, send: Any, small_pieces: int
) -> None:
    proxy = moto.behind_proxy()
    proxy.plan = lambda method, key, query: "503" if "partNumber" in query else None
    with pytest.raises(StoreUnavailableError, match=re.escape(proxy.url)):
        send(moto.machine(deadline_s=1), {"weights.safetensors": random.Random(8).randbytes(2 * small_pieces)})


def test_two_machines_that_send_the_same_blob_leave_one_and_nothing_else(
    place: Any, send: Any, small_pieces: int
) -> None:
    content = random.Random(6).randbytes(3 * small_pieces)
    entries: list[FileEntry] = []
    machines = [place.machine() for _ in range(3)]
    threads = [
        threading.Thread(target=lambda one=one: entries.extend(send(one, {"w.safetensors": content}).values()))
        for one in machines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries) == 3
    assert place.machine().blob_fault(entries[0], AREA) is None
    assert place.uploads() == []


def test_sweep_aborts_what_is_old_and_leaves_what_moves(moto: Any) -> None:
    # moto says of every upload that it was begun in 2010.
    begun = [
        moto.client.create_multipart_upload(Bucket=moto.bucket, Key=f"{prefix}/v1/blob/{number}")["UploadId"]
        for prefix, number in (("team/models", 0), ("team/models", 1), ("team/other", 2))
    ]
    moto.client.upload_part(
        Bucket=moto.bucket, Key="team/models/v1/blob/1", UploadId=begun[1], PartNumber=1, Body=b"just arrived"
    )
    assert moto.machine().sweep_leftovers(older_than_s=0) == 1
    assert {upload["UploadId"] for upload in moto.uploads()} == {begun[1], begun[2]}


def test_sweep_removes_old_downloads_that_nobody_goes_on_with(place: Any) -> None:
    bucket = place.machine()
    folder = bucket.pool.root / "v1" / "partial"
    folder.mkdir(parents=True)
    names = {"old": 3, "held": 3, "young": 0}
    for name, days in names.items():
        (folder / name).write_bytes(b"half")
        modified = time.time() - days * 86_400
        os.utime(folder / name, (modified, modified))
    with (folder / "held.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert bucket.sweep_leftovers(older_than_s=0) == 1
    assert sorted(path.name for path in folder.glob("*")) == ["held", "held.lock", "young"]
