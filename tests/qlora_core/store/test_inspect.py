"""Listing, showing and verifying: what is there, why, and what of it is broken."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.errors import StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.contents import seal
from qlora_core.store.inventory import list_artifacts, show_artifact
from qlora_core.store.layout import BLOBS, QUARANTINE, VERDICTS, blob_name
from qlora_core.store.lease import finish
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import FileEntry, Manifest, new_manifest
from qlora_core.store.refs import add_pin, add_ref, remove_pin, remove_ref
from qlora_core.store.shelf import Shelf
from qlora_core.store.store import Store
from qlora_core.store.verification import verify
from qlora_core.store.work import WorkArea


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalFolder(tmp_path / "store"))


@pytest.fixture
def damage(tmp_path: Path) -> Callable[[str, bytes | None], None]:
    """Overwrite something stored behind the store's back; None deletes it."""

    def overwrite(name: str, content: bytes | None) -> None:
        file = tmp_path / "store" / name
        if content is None:
            file.unlink()
        else:
            file.chmod(0o644)
            file.write_bytes(content)

    return overwrite


Damage = Callable[[str, bytes | None], None]


def publish(store: Store, stage: str, name: str, inputs: dict[str, str] | None = None) -> Manifest:
    with store.backend.staging() as folder:
        (folder / "result.json").write_text(f"{stage} {name}")
        (folder / "shared.json").write_text("shared by all")
        files = seal(folder)
        manifest = new_manifest(stage, "1", {"name": name}, inputs or {}, files)
        store.backend.send(folder, files, BLOBS)
    finish(store.backend, manifest)
    return manifest


def build(folder: Path) -> None:
    (folder / "result.json").write_text("{}")


def test_listing_is_newest_first_and_says_what_keeps_each(store: Store) -> None:
    rows = publish(store, "curate", "a")
    swept = publish(store, "sweep", "a", {"curate": rows.digest})
    loose = publish(store, "sweep", "b")
    add_pin(store.backend, "audit", [swept.address])
    add_ref(store.backend, "model", "assistant/1", [swept.address])
    with store.leases.attempt(f"stage/evaluate/{'e' * 64}", {"sweep": swept.digest}):
        listed, faults = list_artifacts(store)
    assert [row["key"] for row in listed] == [loose.key, swept.key, rows.key]
    assert faults == {}
    kept = ["lease of process", "model assistant/1", "pin audit"]
    for row in listed[1:]:
        assert [reason.split(" ", 2)[:2] for reason in row["kept_by"]] == [name.split(" ", 2)[:2] for name in kept]
    assert listed[0]["kept_by"] == []
    assert (listed[0]["files"], listed[0]["size_bytes"]) == (2, loose.size_bytes)


def test_showing_tells_the_manifest_and_its_users(store: Store) -> None:
    rows = publish(store, "curate", "a", {"sources/rows.json": "r" * 64})
    swept = publish(store, "sweep", "a", {"curate": rows.digest})
    shown = show_artifact(store, rows.address)
    assert shown["used_by"] == [swept.address]
    assert shown["inputs"] == {"sources/rows.json": "r" * 64}
    assert shown["config"] == {"name": "a"}
    assert shown["files"]["result.json"]["sha256"] == rows.files["result.json"].sha256
    with pytest.raises(StoreError, match="no artifact"):
        show_artifact(store, f"v1/stage/sweep/{'0' * 64}")


def test_listing_writes_nothing(store: Store, tmp_path: Path) -> None:
    publish(store, "sweep", "a")

    def content() -> list[str]:
        return sorted(str(path) for path in (tmp_path / "store").rglob("*"))

    before = content()
    list_artifacts(store)
    verify(store)
    assert content() == before


def test_sound_store_verifies_and_orphans_are_counted(store: Store) -> None:
    kept, gone = publish(store, "sweep", "a"), publish(store, "sweep", "b")
    store.backend.remove(f"{gone.address}/manifest.json")
    found = verify(store)
    assert found.ok
    assert (found.artifacts, found.blobs, found.size_bytes) == (1, 2, kept.size_bytes)
    assert (found.orphans, found.orphan_bytes) == (1, gone.files["result.json"].size_bytes)


@pytest.mark.parametrize("content", [b"shared by alL", b"shared", b"", None], ids=["bit", "cut", "empty", "missing"])
def test_broken_blob_is_named_once_with_all_that_it_breaks(store: Store, damage: Damage, content: bytes | None) -> None:
    made = [publish(store, "sweep", name) for name in "ab"]
    sha256 = made[0].files["shared.json"].sha256
    damage(blob_name(sha256), content)
    before = sorted(listed.name for listed in store.backend.list("v1/"))
    found = verify(store)
    (broken,) = found.to_json()["broken"]
    assert broken["blob"] == sha256
    assert sha256 in broken["fault"]
    assert {(file["key"], file["path"]) for file in broken["files"]} == {(each.key, "shared.json") for each in made}
    assert not found.ok
    # Nothing was asked to be moved.
    assert sorted(listed.name for listed in store.backend.list("v1/")) == before


def test_repair_makes_the_next_run_build_anew(store: Store, damage: Damage) -> None:
    key = StageKey("sweep", "1", {}, {})
    store.get_or_build(key, build)
    made = store.find(key)
    assert made is not None
    sha256 = made.files["result.json"].sha256
    damage(blob_name(sha256), b"[]")
    found = verify(store, repair=True)
    assert found.set_aside == [blob_name(sha256), f"{key.address}/manifest.json"]
    assert len(list(store.backend.list(f"{QUARANTINE}/"))) == 2
    assert verify(store).ok
    assert store.find(key) is None
    assert store.get_or_build(key, build)[1] is False
    assert verify(store).ok


@pytest.mark.parametrize("repair", [False, True])
def test_corrupt_manifest_is_named_and_moved_only_on_request(store: Store, damage: Damage, repair: bool) -> None:
    made, other = publish(store, "sweep", "a"), publish(store, "sweep", "b")
    damage(f"{made.address}/manifest.json", b'{"stage": "sweep"}')
    found = verify(store, repair=repair)
    (unsound,) = found.to_json()["manifests"]
    assert unsound["address"] == made.address
    assert list_artifacts(store)[1] == ({} if repair else {made.address: unsound["fault"]})
    assert [row["key"] for row in list_artifacts(store)[0]] == [other.key]
    assert verify(store).ok is repair


class CollectedMeanwhile(LocalFolder):
    """A folder in which everything is collected just before it is read."""

    def blob_fault(self, entry: FileEntry, area: str) -> str | None:
        for listed in [*self.list("v1/stage/"), *self.list("v1/blob/")]:
            self.remove(listed.name)
        return super().blob_fault(entry, area)


def test_artifact_collected_meanwhile_is_not_called_broken(store: Store) -> None:
    publish(store, "sweep", "a")
    assert verify(Store(CollectedMeanwhile(Path(store.location)))).ok


def test_verification_does_not_trust_a_folder_that_a_stage_was_given(store: Store, tmp_path: Path) -> None:
    key = StageKey("sweep", "1", {}, {})
    artifact, _ = store.get_or_build(key, build)
    blob = tmp_path / "store" / blob_name(artifact.manifest.files["result.json"].sha256)
    os.unlink(blob)  # noqa: PTH108 - the folder's link keeps the file
    assert (artifact.path / "result.json").read_text() == "{}"
    assert not verify(store).ok


LEASE, PIN = f"v1/lease/stage/sweep/{'1' * 64}.json", "v1/pin/keep.json"
REF, SNAPSHOT = f"v1/ref/model/{'2' * 64}.json", "v1/work/sweep/t0/snapshot.json"
VERDICT = f"v1/verdict/33/{'3' * 64}.json"
UNSOUND = [LEASE, PIN, REF, SNAPSHOT, VERDICT]


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_record_is_named_and_hides_nothing_else(store: Store, name: str) -> None:
    kept = publish(store, "sweep", "a")
    add_pin(store.backend, "audit", [kept.address])
    store.backend.create(name, b'{"schema_version": ')
    rows, faults = list_artifacts(store)
    assert [(row["key"], row["kept_by"]) for row in rows] == [(kept.key, ["pin audit"])]
    shown = show_artifact(store, kept.address)
    assert shown["kept_by"] == ["pin audit"]
    # What a judge said keeps nothing, and is not read for this.
    assert list(faults) == list(shown["corrupt"]) == [each for each in [name] if each != VERDICT]
    found = verify(store)
    assert [each["name"] for each in found.to_json()["records"]] == [name]
    assert name in found.records[name]
    assert not found.ok
    assert found.set_aside == []


def test_repair_moves_what_a_computer_wrote_and_leaves_what_may_keep_something(store: Store) -> None:
    publish(store, "sweep", "a")
    for name in UNSOUND:
        store.backend.create(name, b'{"schema_version": ')
    found = verify(store, repair=True)
    assert set(found.set_aside) == {LEASE, SNAPSHOT, VERDICT}
    assert len(list(store.backend.list(f"{QUARANTINE}/"))) == 3
    again = verify(store, repair=True)
    assert set(again.records) == {PIN, REF}
    assert "`qlora store unpin keep`" in again.records[PIN]
    assert "from a backup" in again.records[REF]
    remove_pin(store.backend, "keep")
    store.backend.remove(REF)
    assert verify(store).ok


def test_sound_records_of_all_kinds_are_not_named(store: Store, tmp_path: Path) -> None:
    made = publish(store, "sweep", "a")
    add_pin(store.backend, "audit", [made.address])
    add_ref(store.backend, "model", "assistant/1", [made.address])
    Shelf(store.backend, VERDICTS).put("3" * 64, {"slot": "tie"})
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.json").write_text("{}")
    WorkArea(store.backend, "sweep/t0").save(tmp_path / "state", "step-1")
    with store.leases.attempt(f"stage/evaluate/{'e' * 64}"):
        assert verify(store).ok


def test_what_is_kept_and_gone_is_broken_with_who_names_it(store: Store) -> None:
    gone, there = publish(store, "sweep", "a"), publish(store, "sweep", "b")
    add_pin(store.backend, "audit", [gone.address, there.address])
    add_ref(store.backend, "model", "assistant/1", [gone.address])
    store.backend.remove(f"{gone.address}/manifest.json")
    found = verify(store)
    named = {"address": gone.address, "named_by": ["pin audit", "model assistant/1"]}
    assert found.to_json()["missing"] == [named]
    assert not found.ok
    remove_pin(store.backend, "audit")
    remove_ref(store.backend, "model", "assistant/1")
    assert verify(store).ok
