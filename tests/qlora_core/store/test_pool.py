"""Blobs on this machine: what was used longest ago goes first, what a living process was given stays."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_core.digest import digest_bytes
from qlora_core.errors import StoreError
from qlora_core.store.layout import BLOBS
from qlora_core.store.manifest import FileEntry, files_digest
from qlora_core.store.pool import BlobPool

PROGRAMS = Path(__file__).parent / "programs"
Files = dict[str, FileEntry]
CANNOT_REFUSE_LINKS = 77


def content(number: int) -> bytes:
    return bytes([number]) * 1000


def entry(number: int) -> FileEntry:
    return FileEntry(sha256=digest_bytes(content(number)), size_bytes=1000)


def fill(root: Path, *numbers: int) -> None:
    """Blobs of 1000 bytes, used one after another."""
    for age, number in enumerate(numbers):
        incoming = root.parent / "incoming"
        incoming.write_bytes(content(number))
        pool = BlobPool(root)
        pool.adopt(incoming, entry(number).sha256)
        used_ns = 1_000_000_000 * (1000 + age)
        os.utime(pool.path(entry(number).sha256), ns=(used_ns, used_ns))


def there(root: Path) -> list[int]:
    return [number for number in range(20) if BlobPool(root).path(entry(number).sha256).exists()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "pool"


Hold = Callable[[Files], "subprocess.Popen[str]"]


@pytest.fixture
def hold(root: Path) -> Iterator[Hold]:
    """Starts a process that is given a folder of the pool and lives until it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(files: Files) -> "subprocess.Popen[str]":
        described = [f"{path}={file.sha256}:{file.size_bytes}" for path, file in files.items()]
        command = [sys.executable, PROGRAMS / "hold_view.py", str(root), "1000", *described]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout
        assert started[-1].stdout.readline().strip() == str(BlobPool(root).views / files_digest(files))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_without_a_limit_nothing_goes(root: Path) -> None:
    fill(root, 1, 2, 3)
    assert BlobPool(root).make_room() == 0
    assert there(root) == [1, 2, 3]


def test_what_was_used_longest_ago_goes_first_and_no_more_than_needed(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(root, 3, 1, 4, 2, 5)
    assert BlobPool(root, 5000).make_room() == 0
    with caplog.at_level(logging.INFO):
        assert BlobPool(root, 3500).make_room() == 2000
    assert there(root) == [2, 4, 5]
    assert str(root) in caplog.text


def test_to_be_read_is_to_be_used(root: Path) -> None:
    fill(root, 1, 2, 3)
    pool = BlobPool(root, 2000)
    assert pool.fault(entry(1)) is None
    pool.make_room()
    assert there(root) == [1, 3]


def test_spoiled_blob_does_not_count_as_used(root: Path) -> None:
    fill(root, 1, 2, 3)
    pool = BlobPool(root, 2000)
    pool.path(entry(1).sha256).chmod(0o644)
    with pool.path(entry(1).sha256).open("r+b") as stream:
        stream.write(b"!")
    os.utime(pool.path(entry(1).sha256), (1, 1))
    assert entry(1).sha256 in (pool.fault(entry(1)) or "")
    pool.make_room()
    assert there(root) == [2, 3]


def test_folder_of_a_living_process_stays_and_goes_with_its_death(root: Path, hold: Hold) -> None:
    fill(root, 1, 2, 3, 4)
    files = {"a.json": entry(1), "sub/b.json": entry(2)}
    process = hold(files)
    folder = BlobPool(root).views / files_digest(files)
    assert BlobPool(root).in_use() == {files_digest(files)}
    BlobPool(root, 1000).make_room()
    assert there(root) == [1, 2]
    assert (folder / "sub" / "b.json").read_bytes() == content(2)
    assert not BlobPool(root).remove_view(files_digest(files))
    process.kill()
    process.wait()
    assert BlobPool(root).in_use() == set()
    assert BlobPool(root, 1000).make_room() == 1000
    assert there(root) == [2]
    # A folder of links without one of its blobs would take up room that nobody counts.
    assert list(BlobPool(root).views.iterdir()) == []


def test_own_folder_stays_too(root: Path) -> None:
    fill(root, 1, 2)
    pool = BlobPool(root, 500)
    folder = pool.view("d" * 64, {"a.json": entry(1)})
    assert folder is not None
    pool.make_room()
    assert there(root) == [1]
    assert (folder / "a.json").read_bytes() == content(1)


def test_two_holders_of_one_folder_are_two(root: Path, hold: Hold) -> None:
    fill(root, 1)
    files = {"a.json": entry(1)}
    first, second = hold(files), hold(files)
    first.kill()
    first.wait()
    assert not BlobPool(root).remove_view(files_digest(files))
    second.kill()
    second.wait()
    assert BlobPool(root).remove_view(files_digest(files))
    assert list(BlobPool(root).views.iterdir()) == []
    assert BlobPool(root).remove_view(files_digest(files))


def test_folder_whose_blob_was_evicted_is_not_given_out(root: Path) -> None:
    fill(root, 1)
    pool = BlobPool(root)
    assert pool.view("d" * 64, {"a.json": entry(1), "b.json": entry(2)}) is None
    fill(root, 2)
    folder = pool.view("d" * 64, {"a.json": entry(1), "b.json": entry(2)})
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]


def test_links_are_of_the_blob_and_may_not_be_written(root: Path) -> None:
    fill(root, 1)
    folder = BlobPool(root).view("d" * 64, {"a.json": entry(1)})
    assert folder is not None
    assert (folder / "a.json").samefile(BlobPool(root).path(entry(1).sha256))
    assert (folder / "a.json").stat().st_mode & 0o222 == 0


def test_crowd_in_a_small_pool_gets_what_it_asks_for(tmp_path: Path) -> None:
    command = [sys.executable, PROGRAMS / "crowd_pool.py", str(tmp_path), "6", "25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pool = tmp_path / "pool"
    BlobPool(pool, 5000).make_room()
    # Negative control: it was too small for all.
    assert 1 <= len(list((pool / BLOBS).glob("*/*"))) <= 5
    assert not list(pool.rglob("*.part"))


def test_file_in_the_way_of_the_folders_is_named(root: Path) -> None:
    fill(root, 1)
    BlobPool(root).views.write_text("a file where the folders should be")
    with pytest.raises(StoreError, match=f"{root}.*a file stands where a folder is needed"):
        BlobPool(root).view("d" * 64, {"a.json": entry(1)})


def without_links(program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, PROGRAMS / "without_links.py", PROGRAMS / program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == CANNOT_REFUSE_LINKS:
        pytest.skip("the kernel cannot be told to refuse hard links here")
    assert done.returncode == 0, done.stderr
    return done


def test_where_no_file_has_two_names_folders_hold_copies_and_one_producer_wins(tmp_path: Path) -> None:
    without_links("race.py", tmp_path, 20)
    assert len((tmp_path / "builds").read_text().splitlines()) == 1
    assert len((tmp_path / "answers").read_text().splitlines()) == 20
    store = tmp_path / "store" / "v1"
    (copy,) = (store / "view").glob("*/result.json")
    assert copy.stat().st_nlink == 1
    assert copy.stat().st_mode & 0o222 == 0
    assert list((store / "tmp").iterdir()) == []


def test_where_no_file_has_two_names_spoiled_copies_are_made_anew(tmp_path: Path) -> None:
    without_links("race.py", tmp_path, 2)
    (copy,) = (tmp_path / "store" / "v1" / "view").glob("*/result.json")
    before = copy.read_bytes()
    copy.chmod(0o644)
    copy.write_bytes(b"spoiled")
    without_links("race.py", tmp_path, 5)
    assert copy.read_bytes() == before
    assert len((tmp_path / "builds").read_text().splitlines()) == 1


def test_crowd_in_a_small_pool_of_copies_gets_what_it_asks_for(tmp_path: Path) -> None:
    without_links("crowd_pool.py", tmp_path, 4, 15)
    assert not list(tmp_path.rglob("*.part"))
