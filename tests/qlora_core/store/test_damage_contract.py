"""What any store does about what was changed behind its back: it names it, sets it aside, and never hands it out."""

import json
import logging
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from qlora_core.digest import digest_json
from qlora_core.store.artifact import StageKey

Build = Callable[[Path], None]
Files = dict[str, bytes]


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def named_like(place: Any, prefix: str) -> list[str]:
    return [name for name in place.names() if name.startswith(prefix)]


def never(folder: Path) -> None:
    pytest.fail("built although it is stored")


def swap(place: Any, files: Files) -> None:
    place.change("config.json", files["tokenizer/tokenizer.json"])
    place.change("tokenizer/tokenizer.json", files["config.json"])


def flip(place: Any, files: Files) -> None:
    content = bytearray(files["model.safetensors"])
    content[100] ^= 1
    place.change("model.safetensors", bytes(content))


DAMAGES: dict[str, tuple[Callable[[Any, Files], None], list[str]]] = {
    "one bit flipped": (flip, ["model.safetensors"]),
    "truncated": (lambda place, files: place.change("config.json", files["config.json"][:5]), ["config.json"]),
    "emptied": (lambda place, files: place.change("config.json", b""), ["config.json"]),
    "deleted": (lambda place, files: place.change("tokenizer/tokenizer.json", None), ["tokenizer/tokenizer.json"]),
    "two blobs swapped": (swap, ["config.json", "tokenizer/tokenizer.json"]),
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
    for path in named:
        assert path in caplog.text
        assert sha256(files[path]).hexdigest() in caplog.text
    assert place.store.find(key) is None
    set_aside = named_like(place, "v1/quarantine/")
    assert sum(name.startswith("v1/quarantine/stage/") for name in set_aside) == 1
    blobs_left = len(named) if damage != "deleted" else 0
    assert sum(name.startswith("v1/quarantine/blob/") for name in set_aside) == blobs_left
    rebuilt, cached = place.reader().get_or_build(key, build)
    assert not cached
    assert contents(rebuilt.path) == files
    healed = place.reader().get(key)
    assert healed is not None
    assert contents(healed.path) == files


def test_rebuilding_one_artifact_heals_another_that_shares_the_blob(
    place: Any, key: StageKey, build: Build, files: Files
) -> None:
    other = StageKey("curate", "1", {}, {})
    place.store.get_or_build(key, build)
    place.store.get_or_build(other, build)
    flip(place, files)
    _, cached = place.reader().get_or_build(other, build)
    assert not cached
    shared, cached = place.reader().get_or_build(key, never)
    assert cached
    assert contents(shared.path) == files


def test_folder_of_links_is_exactly_the_manifests_files(
    place: Any, key: StageKey, build: Build, files: Files, tmp_path: Path
) -> None:
    artifact, _ = place.store.get_or_build(key, build)
    (artifact.path / "stray.safetensors").write_bytes(b"from elsewhere")
    (artifact.path / "adapter").symlink_to(tmp_path)
    (artifact.path / "config.json").unlink()
    (artifact.path / "config.json").write_bytes(b'{"hidden_size": 65}\n')
    (artifact.path / "model.safetensors").unlink()
    (artifact.path / "model.safetensors").mkdir()
    (artifact.path / "tokenizer" / "tokenizer.json").unlink()
    (artifact.path / "tokenizer").rmdir()
    (artifact.path / "tokenizer").symlink_to(tmp_path)
    again = place.store.get(key)
    assert again is not None
    assert contents(again.path) == files
    assert not any(path.is_symlink() for path in again.path.rglob("*"))
    assert not (tmp_path / "tokenizer.json").exists()


def test_file_changed_through_its_link_is_never_read(place: Any, key: StageKey, build: Build, files: Files) -> None:
    artifact, _ = place.store.get_or_build(key, build)
    (artifact.path / "config.json").chmod(0o644)
    (artifact.path / "config.json").write_bytes(b'{"hidden_size": 65}\n')
    again, _ = place.store.get_or_build(key, build)
    assert contents(again.path) == files


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        document = json.loads(raw)
        change(document)
        # A careful attacker keeps the digest and the checksum right.
        document["digest"] = digest_json({path: entry["sha256"] for path, entry in document["files"].items()})
        del document["checksum"]
        document["checksum"] = digest_json(document)
        return json.dumps(document).encode()

    return edit


def renamed(path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["files"][path] = document["files"].pop("config.json")

    return change


def below(path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["files"][path] = document["files"]["config.json"]

    return change


def other_config(document: dict[str, Any]) -> None:
    document["config"]["blocksize"] = 128


MANIFESTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "path upwards": (edited(renamed("../../escaped.json")), "no path inside an artifact"),
    "path with a dot": (edited(renamed("./escaped.json")), "no path inside an artifact"),
    "absolute path": (edited(renamed("/tmp/escaped.json")), "no path inside an artifact"),
    "backslash path": (edited(renamed("..\\escaped.json")), "no path inside an artifact"),
    "file that is a folder": (edited(below("config.json/more/a.json")), "a file and a folder in one"),
    "cut short": (lambda raw: raw[: len(raw) // 2], "not JSON"),
    "emptied": (lambda raw: b"", "not JSON"),
    "no text": (lambda raw: b"\xff\xfe\x00", "damaged"),
    "other settings": (edited(other_config), "key does not follow"),
    "unknown field": (edited(lambda document: document.update(extra=1)), "extra"),
    "no files": (edited(lambda document: document.update(files={})), "files"),
    "forged digest": (lambda raw: raw.replace(b'"digest": "', b'"digest": "0')[:-1], "manifest.json"),
    "other producer": (lambda raw: raw.replace(b'"pid": ', b'"pid": 1'), "checksum"),
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
    assert len(named_like(place, "v1/quarantine/")) == 1
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
    assert place.reader().get(other) is not None
