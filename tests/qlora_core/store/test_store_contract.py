"""What any store promises, folder or bucket: hits, verified reads, one winner, nothing half-written."""

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


def manifests(place: Any) -> list[str]:
    return [name for name in place.names() if name.startswith("v1/stage/")]


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


def test_other_settings_are_another_artifact(place: Any, key: StageKey, build: Build) -> None:
    place.store.get_or_build(key, build)
    other = StageKey(key.stage, key.version, {**key.config, "blocksize": 128}, key.inputs)
    assert place.store.get(other) is None
    _, cached = place.store.get_or_build(other, build)
    assert not cached
    # The same files are the same identity, whatever key they were built under.
    assert place.store.find(other).digest == place.store.find(key).digest


def swap(place: Any, files: Files) -> None:
    place.change("config.json", files["tokenizer/tokenizer.json"])
    place.change("tokenizer/tokenizer.json", files["config.json"])


def flip(place: Any, files: Files) -> None:
    content = bytearray(files["model.safetensors"])
    content[100] ^= 1
    place.change("model.safetensors", bytes(content))


DAMAGES: dict[str, tuple[Callable[[Any, Files], None], str]] = {
    "one bit flipped": (flip, "model.safetensors"),
    "truncated": (lambda place, files: place.change("config.json", files["config.json"][:5]), "config.json"),
    "emptied": (lambda place, files: place.change("config.json", b""), "config.json"),
    "deleted": (lambda place, files: place.change("tokenizer/tokenizer.json", None), "tokenizer/tokenizer.json"),
    "two files swapped": (swap, "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_artifact_is_named_set_aside_and_built_anew(
    place: Any, key: StageKey, build: Build, files: Files, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    place.store.get_or_build(key, build)
    hurt, named = DAMAGES[damage]
    hurt(place, files)
    with caplog.at_level(logging.WARNING):
        assert place.reader().get(key) is None
    assert named in caplog.text
    if damage != "deleted":
        assert sha256(files[named]).hexdigest() in caplog.text
    assert place.store.find(key) is None
    assert any(name.startswith("v1/quarantine/") for name in place.names())
    rebuilt, cached = place.reader().get_or_build(key, build)
    assert not cached
    assert contents(rebuilt.path) == files
    healed = place.reader().get(key)
    assert healed is not None
    assert contents(healed.path) == files


def test_undamaged_artifact_is_read_without_a_warning(
    place: Any, key: StageKey, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    place.store.get_or_build(key, build)
    with caplog.at_level(logging.WARNING):
        assert place.reader().get(key) is not None
    assert caplog.text == ""
    assert not any(name.startswith("v1/quarantine/") for name in place.names())


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        document = json.loads(raw)
        change(document)
        # A careful attacker keeps the digest right.
        document["digest"] = sha256(
            json.dumps(
                {path: entry["sha256"] for path, entry in document["files"].items()},
                sort_keys=True,
                separators=(",", ":"),
            ).encode()
        ).hexdigest()
        return json.dumps(document).encode()

    return edit


def renamed(path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["files"][path] = document["files"].pop("config.json")

    return change


def other_config(document: dict[str, Any]) -> None:
    document["config"]["blocksize"] = 128


MANIFESTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "path upwards": (edited(renamed("../../escaped.json")), "no path inside an artifact"),
    "absolute path": (edited(renamed("/tmp/escaped.json")), "no path inside an artifact"),
    "backslash path": (edited(renamed("..\\escaped.json")), "no path inside an artifact"),
    "cut short": (lambda raw: raw[: len(raw) // 2], "not JSON"),
    "emptied": (lambda raw: b"", "not JSON"),
    "other settings": (edited(other_config), "key does not follow"),
    "unknown field": (edited(lambda document: document.update(extra=1)), "extra"),
    "no files": (edited(lambda document: document.update(files={})), "files"),
    "forged digest": (lambda raw: raw.replace(b'"digest": "', b'"digest": "0')[:-1], "manifest.json"),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_unsound_manifest_is_a_miss_and_set_aside(
    place: Any, key: StageKey, build: Build, damage: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    place.store.get_or_build(key, build)
    edit, complaint = MANIFESTS[damage]
    place.change_manifest(edit)
    reader = place.reader()
    with caplog.at_level(logging.WARNING):
        assert reader.find(key) is None
        assert reader.get(key) is None
    assert complaint in caplog.text
    assert not list(tmp_path.rglob("escaped.json"))
    _, cached = reader.get_or_build(key, build)
    assert not cached
    assert reader.get(key) is not None


def test_manifest_edited_back_to_itself_is_sound(place: Any, key: StageKey, build: Build) -> None:
    place.store.get_or_build(key, build)
    place.change_manifest(edited(lambda document: None))
    assert place.reader().get(key) is not None


def test_manifest_of_another_artifact_in_its_place_is_a_miss(place: Any, key: StageKey, build: Build) -> None:
    place.store.get_or_build(key, build)
    other = StageKey(key.stage, "2", key.config, key.inputs)
    foreign, _ = place.store.get_or_build(other, build)
    place.change_manifest(lambda raw: foreign.manifest.to_json())
    assert place.reader().get(key) is None


def test_racing_producers_leave_one_winner(place: Any, key: StageKey) -> None:
    producers = 5
    together = threading.Barrier(producers)

    def produce(number: int) -> tuple[str, Files]:
        def build(folder: Path) -> None:
            (folder / "result.json").write_text(json.dumps({"producer": number}))
            together.wait(timeout=20)

        artifact, cached = stores[number].get_or_build(key, build)
        assert not cached
        return artifact.digest, contents(artifact.path)

    stores = [place.reader() for _ in range(producers)]
    with ThreadPoolExecutor(producers) as pool:
        results = list(pool.map(produce, range(producers)))
    assert all(result == results[0] for result in results)
    assert len([name for name in manifests(place) if name.endswith("/manifest.json")]) == 1
    final = place.reader().get(key)
    assert final is not None
    assert (final.digest, contents(final.path)) == results[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_interrupted_build_leaves_nothing_and_is_done_again(
    place: Any, key: StageKey, build: Build, files: Files, error: type[BaseException], tmp_path: Path
) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half.json").write_text("{}")
        raise error

    with pytest.raises(error):
        place.store.get_or_build(key, interrupted)
    assert place.names() == []
    assert not list(tmp_path.rglob("half.json"))
    assert not list(tmp_path.rglob("*.lock"))
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
    assert place.names() == []


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
