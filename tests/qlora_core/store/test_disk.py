"""What the operating system refuses ends in words, and in time."""

import contextlib
import threading
from pathlib import Path

import pytest

from qlora_core.errors import StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.disk import make_folder, put
from qlora_core.store.store import open_store

# Folders that are not there, though those above them are: no file system but this one says so of a new one.
NO_FOLDERS = Path("/proc/sys/qlora")


@pytest.fixture(autouse=True)
def only_where_folders_cannot_be_made() -> None:
    if not NO_FOLDERS.parent.is_dir():
        pytest.skip(f"there is no {NO_FOLDERS.parent}")


def test_folder_that_can_never_be_made_is_named_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StoreError, match=f"folder {NO_FOLDERS}: "):
        make_folder(NO_FOLDERS / "v1" / "tmp")
    with pytest.raises(StoreError, match=f"folder {NO_FOLDERS}: "):
        put(tmp_path / "file", NO_FOLDERS / "file", Path.rename)
    assert (tmp_path / "file").read_text() == "kept"


def test_file_that_can_never_be_put_is_named_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")

    def refused(source: Path, target: Path) -> None:
        (target / "above" / "it").write_bytes(source.read_bytes())

    with pytest.raises(StoreError, match=f"folder {tmp_path}: "):
        put(tmp_path / "file", tmp_path / "target", refused)


def test_store_where_no_folder_can_be_made_says_so(tmp_path: Path) -> None:
    store = open_store(str(NO_FOLDERS), tmp_path)
    with pytest.raises(StoreError, match=str(NO_FOLDERS)):
        store.get_or_build(StageKey("sweep", "1", {}, {}), lambda folder: None)


def test_folder_that_is_removed_now_and_then_is_made(tmp_path: Path) -> None:
    over = threading.Event()

    def remove() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                (tmp_path / "a" / "b").rmdir()
                (tmp_path / "a").rmdir()
            over.wait(0.0005)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for number in range(50):
            (tmp_path / "file").write_text(str(number))
            put(tmp_path / "file", tmp_path / "a" / "b" / str(number), Path.rename)
            (tmp_path / "a" / "b" / str(number)).unlink()
    finally:
        over.set()
        remover.join()
