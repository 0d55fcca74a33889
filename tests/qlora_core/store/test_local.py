"""What only a folder can suffer: killed producers, full and read-only disks, files in the way, half-deleted folders."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qlora_core.errors import ConfigError, StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.store import open_store

Build = Callable[[Path], None]

PRODUCER = """
import sys, time
from pathlib import Path
from qlora_core.store.artifact import StageKey
from qlora_core.store.store import open_store

def build(folder):
    (folder / "half.json").write_text("{}")
    (Path(sys.argv[1]) / "building").write_text(sys.argv[2])
    time.sleep(float(sys.argv[2]))
    (folder / "result.json").write_text(sys.argv[3])

key = StageKey("sweep", "1", {}, {})
artifact, _ = open_store(sys.argv[1] + "/store", Path("unused")).get_or_build(key, build)
print((artifact.path / "result.json").read_text())
"""
SWEEP_KEY = StageKey("sweep", "1", {}, {})


def producer(folder: Path, seconds: float, result: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PRODUCER, str(folder), str(seconds), result]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_producer_leaves_no_artifact_and_is_cleaned_up(tmp_path: Path) -> None:
    process = producer(tmp_path, 60, "never")
    wait_for(tmp_path / "building")
    watching = open_store(str(tmp_path / "store"), tmp_path)
    # Negative control: a producer that lives keeps its folder.
    assert list((tmp_path / "store").rglob("half.json"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert watching.get(SWEEP_KEY) is None
    assert list((tmp_path / "store").rglob("half.json"))
    store = open_store(str(tmp_path / "store"), tmp_path)
    assert not list((tmp_path / "store").rglob("half.json"))
    assert not list((tmp_path / "store" / "v1" / "tmp").iterdir())
    artifact, cached = store.get_or_build(SWEEP_KEY, lambda folder: write_result(folder, "mended"))
    assert not cached
    assert (artifact.path / "result.json").read_text() == "mended"


def write_result(folder: Path, text: str) -> None:
    (folder / "result.json").write_text(text)


def test_racing_processes_agree_on_one_artifact(tmp_path: Path) -> None:
    processes = [producer(tmp_path, 0.3, str(number)) for number in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert len(answers) == 1
    assert not list((tmp_path / "store" / "v1" / "tmp").iterdir())


def test_staging_folder_of_another_host_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "v1" / "tmp" / "elsewhere-12-abcdef"
    foreign.mkdir(parents=True)
    (foreign.parent / f"{foreign.name}.lock").touch()
    open_store(str(tmp_path), tmp_path)
    assert foreign.is_dir()


def test_many_readers_of_a_corrupt_artifact_never_lose_the_mended_one(
    tmp_path: Path, key: StageKey, build: Build
) -> None:
    artifact, _ = open_store(str(tmp_path), tmp_path).get_or_build(key, build)
    (artifact.path / "config.json").write_text("changed")

    def read(_: int) -> bool:
        found, _ = open_store(str(tmp_path), tmp_path).get_or_build(key, build)
        return (found.path / "config.json").is_file()

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(12)))
    assert len(list((tmp_path / "v1" / "quarantine").iterdir())) == 1


def test_folder_without_manifest_is_a_miss_and_set_aside(
    tmp_path: Path, key: StageKey, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path), tmp_path)
    artifact, _ = store.get_or_build(key, build)
    (artifact.path.parent / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert store.get(key) is None
    assert "manifest.json is missing" in caplog.text
    _, cached = store.get_or_build(key, build)
    assert not cached


def test_empty_folder_in_an_artifacts_place_is_a_miss(tmp_path: Path, key: StageKey, build: Build) -> None:
    (tmp_path / key.address).mkdir(parents=True)
    store = open_store(str(tmp_path), tmp_path)
    _, cached = store.get_or_build(key, build)
    assert not cached
    assert store.get(key) is not None


def test_file_nobody_published_makes_an_artifact_corrupt(
    tmp_path: Path, key: StageKey, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path), tmp_path)
    artifact, _ = store.get_or_build(key, build)
    (artifact.path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert store.get(key) is None
    assert "pytorch_model.bin is not in the manifest" in caplog.text


def test_link_in_a_files_place_is_corrupt(tmp_path: Path, key: StageKey, build: Build) -> None:
    store = open_store(str(tmp_path / "store"), tmp_path)
    artifact, _ = store.get_or_build(key, build)
    same = tmp_path / "same.json"
    (artifact.path / "config.json").rename(same)
    (artifact.path / "config.json").symlink_to(same)
    assert store.get(key) is None


def test_plain_path_and_file_url_are_the_same_store(tmp_path: Path, key: StageKey, build: Build) -> None:
    root = tmp_path / "with space"
    open_store(str(root), tmp_path).get_or_build(key, build)
    assert open_store(f"file://{str(root).replace(' ', '%20')}", tmp_path).get(key) is not None


@pytest.mark.parametrize(
    "url", ["gs://bucket/x", "file://host/x", "", "S4://x", "s3://", "s3://bucket/../x", "s3:///x"]
)
def test_address_that_is_no_store_is_a_config_error_naming_it(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store"):
        open_store(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["", "Upper", "../x", "a/b", "a" * 41, "x\n"])
def test_stage_name_that_cannot_be_a_folder_is_refused(stage: str) -> None:
    with pytest.raises(StoreError, match="stage name"):
        StageKey(stage, "1", {}, {})


def test_key_does_not_depend_on_the_order_of_settings_and_on_nothing_else() -> None:
    key = StageKey("curate", "1", {"a": 1, "b": [1, 2]}, {"x": "1", "y": "2"})
    assert key.key == StageKey("curate", "1", {"b": (1, 2), "a": 1}, {"y": "2", "x": "1"}).key
    others = [
        StageKey("quantize", "1", key.config, key.inputs),
        StageKey("curate", "2", key.config, key.inputs),
        StageKey("curate", "1", {"a": 1.5, "b": [1, 2]}, key.inputs),
        StageKey("curate", "1", key.config, {"x": "1", "y": "3"}),
    ]
    assert len({key.key, *(other.key for other in others)}) == 5
    # printf '%s' '{"config":{"a":1},"inputs":{"x":"y"},"stage":"curate","version":"1"}' | sha256sum
    golden = "c8b3e14fae87d2505aa180377867a4821a6496d826acbb41046958c524afbecf"
    assert StageKey("curate", "1", {"a": 1}, {"x": "y"}).key == golden


def test_file_in_the_stores_place_is_named_with_the_next_step(tmp_path: Path, key: StageKey, build: Build) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("I was here first")
    store = open_store(str(blocked), tmp_path)
    for use in (store.check, lambda: store.get(key), lambda: store.get_or_build(key, build)):
        with pytest.raises(StoreError, match=f"{blocked}.*a file stands where a folder is needed"):
            use()
    assert blocked.read_text() == "I was here first"


def test_builders_own_os_error_is_not_blamed_on_the_store(tmp_path: Path, key: StageKey) -> None:
    def build(folder: Path) -> None:
        (folder / "no" / "such.json").read_text()

    with pytest.raises(FileNotFoundError):
        open_store(str(tmp_path), tmp_path).get_or_build(key, build)


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `folder`, so that full and read-only are real, also for root."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"may not mount a small disk here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path, key: StageKey, build: Build) -> None:
    def too_much(folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(bytes(1 << 17))

    with small_disk(tmp_path / "disk", "size=64k") as disk:
        store = open_store(str(disk / "store"), tmp_path)
        # Negative control: what fits is stored.
        store.check()
        store.get_or_build(SWEEP_KEY, lambda folder: write_result(folder, "fits"))
        with pytest.raises(StoreError, match=r"stage quantize could not write.*No space left.*free space"):
            store.get_or_build(key, too_much)
        assert not list(disk.rglob("weights.safetensors"))
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(1 << 17))
        with pytest.raises(StoreError, match=f"{disk}.*No space left.*the disk is full: free space"):
            store.check()
        assert store.get(SWEEP_KEY) is not None
        filler.unlink()
        _, cached = store.get_or_build(key, build)
        assert not cached


def test_full_disk_is_recognised_when_safetensors_says_so(tmp_path: Path, key: StageKey) -> None:
    def too_much(folder: Path) -> None:
        save_file({"weight": np.zeros(1 << 16)}, folder / "weights.safetensors")

    def broken(folder: Path) -> None:
        save_file({"weight": np.zeros(1)}, folder / "no such folder" / "weights.safetensors")

    with small_disk(tmp_path / "disk", "size=64k") as disk:
        store = open_store(str(disk / "store"), tmp_path)
        with pytest.raises(StoreError, match=r"No space left.*free space"):
            store.get_or_build(key, too_much)
        # Negative control: an error of another kind stays what it is.
        with pytest.raises(SafetensorError, match=r"os error 2\b"):
            store.get_or_build(key, broken)


def test_disk_that_fills_up_before_the_manifest_leaves_nothing(tmp_path: Path, key: StageKey) -> None:
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        store = open_store(str(disk / "store"), tmp_path)

        def fill(folder: Path) -> None:
            write_result(folder, "{}")
            with pytest.raises(OSError, match="No space"):
                (disk / "filler").write_bytes(bytes(1 << 17))

        with pytest.raises(StoreError, match="No space left"):
            store.get_or_build(key, fill)
        assert store.find(key) is None
        assert [path for path in (disk / "store").rglob("*") if path.is_file()] == []


def test_read_only_store_can_be_read_and_says_why_it_cannot_be_written(
    tmp_path: Path, key: StageKey, build: Build
) -> None:
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        open_store(str(disk), tmp_path).get_or_build(key, build)
        remount_read_only(disk)
        store = open_store(str(disk), tmp_path)
        _, cached = store.get_or_build(key, build)
        assert cached
        for use in (store.check, lambda: store.get_or_build(SWEEP_KEY, build)):
            with pytest.raises(StoreError, match=rf"cannot write to {disk}.*Read-only.*mount it writable"):
                use()
