"""What only a folder can suffer: killed producers, full and read-only disks, files in the way, half-deleted folders."""

import fcntl
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qlora_core.errors import ConfigError, StoreError, StoreUnavailableError
from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.layout import BLOBS, blob_name
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import FileEntry
from qlora_core.store.pool import BlobPool
from qlora_core.store.store import Store, open_store

Build = Callable[[Path], None]
SWEEP_KEY = StageKey("sweep", "1", {}, {})


def write_result(folder: Path, text: str) -> None:
    (folder / "result.json").write_text(text)


def blob_path(root: Path, artifact: Artifact, path: str) -> Path:
    return root / blob_name(artifact.manifest.files[path].sha256)


def test_killed_producer_leaves_no_artifact_and_is_cleaned_up(tmp_path: Path, producer: Any) -> None:
    process = producer(60.0, "never")
    watching = open_store(str(tmp_path / "store"), tmp_path)
    # Negative control: a producer that lives keeps its folder.
    assert list((tmp_path / "store").rglob("half.json"))
    process.kill()
    process.wait()
    assert watching.get(SWEEP_KEY) is None
    assert list((tmp_path / "store").rglob("half.json"))
    store = open_store(str(tmp_path / "store"), tmp_path)
    assert not list((tmp_path / "store").rglob("half.json"))
    assert not list((tmp_path / "store" / "v1" / "tmp").iterdir())
    artifact, cached = store.get_or_build(SWEEP_KEY, lambda folder: write_result(folder, "mended"))
    assert not cached
    assert (artifact.path / "result.json").read_text() == "mended"


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
    blob_path(tmp_path, artifact, "config.json").unlink()
    blob_path(tmp_path, artifact, "config.json").write_text("changed")

    def read(_: int) -> bool:
        found, _ = open_store(str(tmp_path), tmp_path).get_or_build(key, build)
        return (found.path / "config.json").is_file()

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(12)))
    quarantined = [path for path in (tmp_path / "v1" / "quarantine").rglob("*") if path.is_file()]
    assert len(quarantined) == 2
    assert open_store(str(tmp_path), tmp_path).get(key) is not None


class MendedMeanwhile(BlobPool):
    """A pool in which a producer puts a sound blob where a reader has just seen a spoiled one."""

    sound: bytes | None = None

    def fault(self, entry: FileEntry, area: str = BLOBS) -> str | None:
        fault = super().fault(entry, area)
        if fault and self.sound is not None:
            incoming = self.path(entry.sha256).with_name("incoming")
            incoming.write_bytes(self.sound)
            self.sound = None
            self.adopt(incoming, entry.sha256)
        return fault


def test_blob_that_was_mended_while_it_was_looked_at_is_not_moved_away(
    tmp_path: Path, key: StageKey, build: Build
) -> None:
    pool = MendedMeanwhile(tmp_path)
    store = Store(LocalFolder(tmp_path, pool))
    artifact, _ = store.get_or_build(key, build)
    blob = blob_path(tmp_path, artifact, "config.json")
    pool.sound = blob.read_bytes()
    blob.unlink()
    blob.write_text("changed")
    assert store.get(key) is not None
    assert not (tmp_path / "v1" / "quarantine").exists()


def test_records_of_one_folder_come_and_go_at_once(tmp_path: Path) -> None:
    def come_and_go(number: int) -> bool:
        backend = LocalFolder(tmp_path)
        return all(
            backend.create(f"v1/pin/{number}.json", b"{}") and backend.remove(f"v1/pin/{number}.json")
            for _ in range(25)
        )

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(come_and_go, range(6)))


def test_file_that_vanished_before_it_was_taken_over_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        BlobPool(tmp_path).adopt(tmp_path / "gone", "a" * 64)


def test_artifact_without_its_manifest_is_a_miss_and_its_blobs_serve_again(
    tmp_path: Path, key: StageKey, build: Build
) -> None:
    store = open_store(str(tmp_path), tmp_path)
    store.get_or_build(key, build)
    (tmp_path / key.address / "manifest.json").unlink()
    assert store.get(key) is None
    _, cached = store.get_or_build(key, build)
    assert not cached
    assert not (tmp_path / "v1" / "quarantine").exists()


def test_empty_folder_in_an_artifacts_place_is_a_miss(tmp_path: Path, key: StageKey, build: Build) -> None:
    (tmp_path / key.address).mkdir(parents=True)
    store = open_store(str(tmp_path), tmp_path)
    _, cached = store.get_or_build(key, build)
    assert not cached
    assert store.get(key) is not None


@pytest.mark.parametrize("kind", ["is a link", "is a folder"])
def test_what_is_no_file_in_a_blobs_place_is_a_named_fault_and_mended(
    tmp_path: Path, key: StageKey, build: Build, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path / "store"), tmp_path)
    artifact, _ = store.get_or_build(key, build)
    blob, same = blob_path(tmp_path / "store", artifact, "config.json"), tmp_path / "same.json"
    blob.rename(same)
    if kind == "is a link":
        blob.symlink_to(same)
    else:
        blob.mkdir()
    assert store.get(key) is None
    assert f"{blob.name}) {kind}" in caplog.text
    mended, _ = store.get_or_build(key, build)
    assert (mended.path / "config.json").read_bytes() == same.read_bytes()
    assert blob.is_file() and not blob.is_symlink()


def test_manifest_that_is_wrong_about_a_size_is_at_fault_and_not_the_blob(
    tmp_path: Path, key: StageKey, build: Build
) -> None:
    store = open_store(str(tmp_path), tmp_path)
    artifact, _ = store.get_or_build(key, build)
    entry = artifact.manifest.files["config.json"]
    files = artifact.manifest.files | {"config.json": entry.model_copy(update={"size_bytes": 3})}
    wrong = artifact.manifest.model_copy(update={"files": files})
    (tmp_path / key.address / "manifest.json").write_bytes(wrong.to_json())
    assert store.get(key) is None
    assert store.backend.blob_fault(entry, BLOBS) is None


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


@pytest.mark.parametrize("name", ["blob", "lease", "lock", "stage", "tmp", "view"])
def test_file_in_the_place_of_any_of_its_folders_is_named(
    tmp_path: Path, key: StageKey, build: Build, name: str
) -> None:
    blocked = tmp_path / "v1" / name
    blocked.parent.mkdir()
    blocked.write_text("I was here first")
    with pytest.raises(StoreError, match=f"{blocked}.*a file stands where a folder is needed"):
        open_store(str(tmp_path), tmp_path).get_or_build(key, build)
    assert blocked.read_text() == "I was here first"


def test_listing_that_cannot_be_made_is_an_error_and_not_empty(tmp_path: Path) -> None:
    backend = open_store(str(tmp_path), tmp_path).backend
    assert list(backend.list("v1/stage/")) == []
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "stage").write_text("no folder")
    with pytest.raises(StoreError, match="cannot list"):
        list(backend.list("v1/stage/"))


def test_lock_that_a_stopped_process_keeps_is_named_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_core.store.disk._LOCK_WAIT_S", 0.2)
    backend = open_store(str(tmp_path), tmp_path).backend
    tag = backend.create("v1/pin/best.json", b"old")
    assert tag
    assert backend.replace("v1/pin/best.json", b"new", tag)
    (lock,) = (tmp_path / "v1" / "lock").iterdir()
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailableError, match=rf"{lock} has been locked .* continue or end that process"):
            backend.remove("v1/pin/best.json")
    assert backend.remove("v1/pin/best.json")


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
        # Lazily: this process keeps the folders of links that it was given until it ends.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


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
        store = open_store(str(disk / "store"), tmp_path, lease_ttl_s=1.0)

        def fill(folder: Path) -> None:
            write_result(folder, "{}")
            with pytest.raises(OSError, match="No space"):
                (disk / "filler").write_bytes(bytes(1 << 17))

        with pytest.raises(StoreError, match="No space left"):
            store.get_or_build(key, fill)
        assert store.find(key) is None
        files = [path for path in (disk / "store").rglob("*") if path.is_file()]
        # The lease could not be given back: there was no room to write that down.
        assert {path.relative_to(disk / "store" / "v1").parts[0] for path in files} == {"lease", "lock"}
        assert list((disk / "store" / "v1" / "tmp").iterdir()) == []
        (disk / "filler").unlink()
        _, cached = store.get_or_build(key, lambda folder: write_result(folder, "{}"))
        assert not cached


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


def test_corrupt_artifact_in_a_read_only_store_is_named_and_a_miss(
    tmp_path: Path, key: StageKey, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        artifact, _ = open_store(str(disk), tmp_path).get_or_build(key, build)
        blob = blob_path(disk, artifact, "config.json")
        blob.chmod(0o644)
        blob.write_text("changed")
        remount_read_only(disk)
        store = open_store(str(disk), tmp_path)
        assert store.get(key) is None
        assert f"config.json (blob {blob.name}): expected sha256" in caplog.text
        assert "Read-only file system" in caplog.text
        with pytest.raises(StoreError, match=r"Read-only.*mount it writable"):
            store.get_or_build(key, build)
