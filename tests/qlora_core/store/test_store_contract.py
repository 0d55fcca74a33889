"""What any store promises, folder or bucket: hits, verified reads, one build, nothing half-written."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import StoreError
from qlora_core.store.artifact import StageKey

Build = Callable[[Path], None]
Files = dict[str, bytes]


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def named_like(place: Any, prefix: str) -> list[str]:
    return [name for name in place.names() if name.startswith(prefix)]


def all_but_leases(place: Any) -> list[str]:
    return [name for name in place.names() if not name.startswith("v1/lease/")]


def never(folder: Path) -> None:
    pytest.fail("built although it is stored")


def test_get_of_an_empty_store_is_a_miss_and_writes_nothing(place: Any, key: StageKey) -> None:
    assert place.store.find(key) is None
    assert place.store.get(key) is None
    assert place.names() == []


def test_first_build_is_a_miss_and_the_second_a_hit(place: Any, key: StageKey, build: Build, files: Files) -> None:
    first, first_cached = place.store.get_or_build(key, build)
    second, second_cached = place.store.get_or_build(key, never)
    assert (first_cached, second_cached) == (False, True)
    assert contents(first.path) == contents(second.path) == files
    assert first.digest == second.digest == first.manifest.digest
    assert (first.stage, first.key) == ("quantize", key.key)


def test_another_machine_reads_the_same_artifact(place: Any, key: StageKey, build: Build, files: Files) -> None:
    built, _ = place.store.get_or_build(key, build)
    read = place.reader().get(key)
    assert read is not None
    assert contents(read.path) == files
    assert read.manifest == built.manifest == place.reader().find(key)


def test_manifest_records_files_key_and_producer(place: Any, key: StageKey, build: Build, files: Files) -> None:
    place.store.get_or_build(key, build)
    manifest = place.store.find(key)
    assert {path: (entry.sha256, entry.size_bytes) for path, entry in manifest.files.items()} == {
        path: (sha256(content).hexdigest(), len(content)) for path, content in files.items()
    }
    assert (manifest.stage, manifest.version, manifest.config) == (key.stage, key.version, key.config)
    assert manifest.inputs == key.inputs
    assert manifest.producer.pid > 0
    assert manifest.created.tzinfo is not None


def test_other_settings_are_another_artifact_of_the_same_blobs(place: Any, key: StageKey, build: Build) -> None:
    first, _ = place.store.get_or_build(key, build)
    other = StageKey(key.stage, key.version, {**key.config, "blocksize": 128}, key.inputs)
    assert place.store.get(other) is None
    second, cached = place.store.get_or_build(other, build)
    assert not cached
    # The same files are the same identity, whatever key they were built under: stored once, read in one folder.
    assert place.store.find(other).digest == place.store.find(key).digest
    assert first.path == second.path
    assert len(named_like(place, "v1/blob/")) == 3
    assert len(named_like(place, "v1/stage/")) == 2


def test_equal_files_of_one_artifact_are_one_blob_under_two_names(place: Any, key: StageKey) -> None:
    def twins(folder: Path) -> None:
        (folder / "a.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "b.json").write_text("{}")

    place.store.get_or_build(key, twins)
    assert len(named_like(place, "v1/blob/")) == 1
    read = place.reader().get(key)
    assert read is not None
    assert contents(read.path) == {"a.json": b"{}", "sub/b.json": b"{}"}


def test_undamaged_artifact_is_read_without_a_warning(
    place: Any, key: StageKey, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        place.store.get_or_build(key, build)
        assert place.reader().get(key) is not None
    assert caplog.text == ""
    assert named_like(place, "v1/quarantine/") == []


def test_racing_producers_build_once(place: Any, key: StageKey) -> None:
    producers = 5
    together = threading.Barrier(producers)
    built: list[int] = []

    def produce(number: int) -> tuple[str, Files, bool]:
        def build(folder: Path) -> None:
            built.append(number)
            (folder / "result.json").write_text(json.dumps({"producer": number}))

        together.wait(timeout=20)
        artifact, cached = stores[number].get_or_build(key, build)
        return artifact.digest, contents(artifact.path), cached

    stores = [place.reader() for _ in range(producers)]
    with ThreadPoolExecutor(producers) as pool:
        results = list(pool.map(produce, range(producers)))
    assert len(built) == 1
    assert [cached for _, _, cached in results].count(False) == 1
    assert {digest for digest, _, _ in results} == {results[0][0]}
    assert all(found == {"result.json": json.dumps({"producer": built[0]}).encode()} for _, found, _ in results)
    assert len(named_like(place, "v1/stage/")) == 1


def test_consumer_waits_for_the_producers_artifact(place: Any, key: StageKey, build: Build, files: Files) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        begun.set()
        assert may_end.wait(20)
        build(folder)

    with ThreadPoolExecutor(2) as pool:
        producing = pool.submit(place.store.get_or_build, key, slow)
        assert begun.wait(20)
        waiting = pool.submit(place.reader().get_or_build, key, never)
        # Negative control: while it is being built, it is not there, and nobody is given anything.
        assert place.reader().get(key) is None
        assert not waiting.done()
        may_end.set()
        artifact, cached = waiting.result(20)
        assert producing.result(20)[1] is False
    assert cached
    assert contents(artifact.path) == files


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_interrupted_build_leaves_nothing_and_is_done_again(
    place: Any, key: StageKey, build: Build, files: Files, error: type[BaseException], tmp_path: Path
) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half.json").write_text("{}")
        raise error

    with pytest.raises(error):
        place.store.get_or_build(key, interrupted)
    assert all_but_leases(place) == []
    assert not list(tmp_path.rglob("half.json"))
    artifact, cached = place.store.get_or_build(key, build)
    assert not cached
    assert contents(artifact.path) == files


def nothing(folder: Path) -> None:
    (folder / "empty").mkdir()


def linked(folder: Path) -> None:
    (folder / "passwords.txt").symlink_to("/etc/passwd")


def linked_folder(folder: Path) -> None:
    (folder / "a.json").write_text("{}")
    (folder / "etc").symlink_to("/etc")


def odd_name(folder: Path) -> None:
    (folder / "two\nlines.json").write_text("{}")


def named(name: str) -> Build:
    def build(folder: Path) -> None:
        (folder / "fine.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / name).write_bytes(b"\x80\x04.")

    return build


REFUSED: dict[str, tuple[Build, str]] = {
    "nothing": (nothing, "no files"),
    "link": (linked, "passwords.txt"),
    "linked folder": (linked_folder, "etc"),
    "odd name": (odd_name, "two\\nlines.json"),
    **{name: (named(name), f"sub/{name}") for name in ("model.bin", "model.pt", "a.pkl", "ckpt.PTH", "run.py", "npz")},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_must_not_be_stored_is_refused_by_name(place: Any, key: StageKey, kind: str) -> None:
    build, named_in_message = REFUSED[kind]
    with pytest.raises(StoreError) as caught:
        place.store.get_or_build(key, build)
    assert named_in_message in str(caught.value)
    assert all_but_leases(place) == []


def test_empty_folders_are_not_part_of_an_artifact(place: Any, key: StageKey, build: Build, files: Files) -> None:
    def with_empty_folders(folder: Path) -> None:
        build(folder)
        (folder / "logs" / "old").mkdir(parents=True)

    artifact, _ = place.store.get_or_build(key, with_empty_folders)
    assert {path.name for path in artifact.path.iterdir()} == {path.split("/")[0] for path in files}


def test_check_of_a_healthy_store_passes_and_leaves_no_probe(place: Any) -> None:
    place.store.check()
    assert place.names() == []


def test_local_stores_are_used_without_heavy_imports(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qlora_core.store.artifact import StageKey\n"
        "from qlora_core.store.store import open_store\n"
        f"assert open_store({str(tmp_path)!r}, Path('x')).find(StageKey('curate', '1', {{}}, {{}})) is None\n"
        "heavy = ('boto3', 'botocore', 'torch', 'numpy', 'rich', 'prefect')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
