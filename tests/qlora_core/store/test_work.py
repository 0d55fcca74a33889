"""Work in progress in a store: the old snapshot or the new one, one writer, and nothing left behind."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import CorruptArtifactError, LeaseLostError, StoreError, StoreUnavailableError
from qlora_core.store.backend import Backend
from qlora_core.store.layout import blob_name
from qlora_core.store.local import LocalFolder
from qlora_core.store.work import WorkArea, clear_work, parse_snapshot, snapshot_name

NAME = "sweep/0123456789abcdef/t000"
FILES = ("adapter.safetensors", "state.json", "inner/notes.txt")


def write_files(folder: Path, text: str, *, same: str = "the same in every snapshot") -> Path:
    """Files of which one does not depend on `text`."""
    (folder / "inner").mkdir(parents=True)
    (folder / "adapter.safetensors").write_text(text * 1000)
    (folder / "state.json").write_text(json.dumps(text))
    (folder / "inner" / "notes.txt").write_text(same)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in FILES}


def names(backend: Backend) -> list[str]:
    return [listed.name for listed in backend.list("v1/work/")]


@pytest.fixture
def backend(place: Any) -> Backend:
    """Of each kind of store in turn."""
    return place.store.backend


@pytest.fixture
def area(backend: Backend) -> WorkArea:
    return WorkArea(backend, NAME, "stage/sweep/" + "c" * 64, {"curate": "d" * 64})


def test_another_machine_restores_what_was_saved(place: Any, area: WorkArea, tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", "first")
    saved = area.save(source, "step-00000003")
    elsewhere = WorkArea(place.reader().backend, NAME)
    restored = elsewhere.restore(tmp_path / "deep" / "target")
    assert restored == elsewhere.newest() == saved
    assert (saved.label, saved.lease, saved.inputs) == (
        "step-00000003",
        "stage/sweep/" + "c" * 64,
        {"curate": "d" * 64},
    )
    assert contents(tmp_path / "deep" / "target") == contents(source)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


def test_record_says_what_collection_needs(backend: Backend, area: WorkArea, tmp_path: Path) -> None:
    area.save(write_files(tmp_path / "source", "first"), "step-1")
    record = backend.read(f"v1/work/{NAME}/snapshot.json")
    assert record is not None
    document = json.loads(record.data)
    assert set(document) == {"schema_version", "name", "label", "lease", "inputs", "files", "created", "nonce"}
    assert set(document["files"]) == set(FILES)
    assert {blob_name(entry["sha256"], f"v1/work/{NAME}/blob") for entry in document["files"].values()} == {
        name for name in names(backend) if "/blob/" in name
    }


def test_next_save_leaves_only_what_it_names(backend: Backend, area: WorkArea, tmp_path: Path) -> None:
    area.save(write_files(tmp_path / "first", "first"), "1")
    second = area.save(write_files(tmp_path / "second", "second"), "2")
    area_of_blobs = f"v1/work/{NAME}/blob"
    named = {blob_name(entry.sha256, area_of_blobs) for entry in second.files.values()}
    assert set(names(backend)) == {snapshot_name(NAME), *named}
    assert area.restore(tmp_path / "target") == second
    assert contents(tmp_path / "target") == contents(tmp_path / "second")


def test_clear_leaves_nothing_and_spares_its_neighbours(backend: Backend, area: WorkArea, tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", "first")
    neighbour = WorkArea(backend, f"{NAME}0")
    for each in (area, neighbour):
        each.save(source, "1")
    area.clear()
    area.clear()
    assert area.newest() is None
    assert area.restore(tmp_path / "target") is None
    assert not (tmp_path / "target").exists()
    assert all(name.startswith(f"v1/work/{NAME}0/") for name in names(backend))
    assert neighbour.restore(tmp_path / "target") is not None
    clear_work(backend, NAME.rpartition("/")[0])
    assert names(backend) == []
    assert area.save(source, "2") == area.newest()


def test_source_folder_stays_as_it_was(area: WorkArea, tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", "first")
    before = {path: (source / path).stat() for path in FILES}
    area.save(source, "1")
    after = {path: (source / path).stat() for path in FILES}
    for path in FILES:
        for field in ("st_ino", "st_mode", "st_mtime_ns", "st_nlink", "st_size"):
            assert getattr(before[path], field) == getattr(after[path], field), (path, field)
    # And what is stored is another file: damage here does no harm there.
    for path in FILES:
        (source / path).write_text("damaged")
    assert area.restore(tmp_path / "target") is not None


# --- one writer


def test_writer_who_was_overtaken_is_refused(backend: Backend, tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", "first")
    first, second = WorkArea(backend, NAME), WorkArea(backend, NAME)
    first.save(source, "1")
    # Negative control: who only looks takes nothing over.
    assert second.newest() is not None
    first.save(source, "2")
    taken = second.take()
    assert taken is not None and taken.label == "2"
    with pytest.raises(LeaseLostError, match=rf"{NAME}/snapshot\.json was taken over .*; 3 is not kept"):
        first.save(source, "3")
    assert second.save(source, "3").label == "3"
    with pytest.raises(LeaseLostError):
        first.save(source, "4")
    # The other way round again, by taking it and not by going on.
    first.take()
    first.save(source, "5")
    with pytest.raises(LeaseLostError):
        second.save(source, "6")
    left = first.newest()
    assert left is not None and left.label == "5"


def test_of_two_who_find_nothing_the_later_is_refused(backend: Backend, tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", "first")
    first, second = WorkArea(backend, NAME), WorkArea(backend, NAME)
    assert first.take() is None and second.take() is None
    first.save(source, "1")
    with pytest.raises(LeaseLostError):
        second.save(source, "1")


def test_writer_is_refused_after_the_area_was_cleared(backend: Backend, area: WorkArea, tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", "first")
    area.save(source, "1")
    clear_work(backend, NAME)
    with pytest.raises(LeaseLostError):
        area.save(source, "2")


class LosesAnswers(LocalFolder):
    """A store whose next answer to a write gets lost: the write is done, and its writer is told of an outage."""

    lost = 0

    def replace(self, name: str, data: bytes, tag: str) -> str | None:
        answer = super().replace(name, data, tag)
        if self.lost:
            self.lost -= 1
            raise StoreUnavailableError("no answer")
        return answer


def test_write_whose_answer_was_lost_does_not_count_as_somebody_elses(tmp_path: Path) -> None:
    store = LosesAnswers(tmp_path / "store")
    source = write_files(tmp_path / "source", "first")
    area = WorkArea(store, NAME)
    area.save(source, "1")
    store.lost = 1
    with pytest.raises(StoreUnavailableError):
        area.save(source, "2")
    assert area.save(source, "3").label == "3"
    # Negative control: somebody else's write in between does count.
    store.lost = 1
    with pytest.raises(StoreUnavailableError):
        area.save(source, "4")
    WorkArea(store, NAME).take()
    with pytest.raises(LeaseLostError):
        area.save(source, "5")


# --- damage


def test_missing_blob_is_named_and_the_snapshot_set_aside(
    backend: Backend, area: WorkArea, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = area.save(write_files(tmp_path / "source", "first"), "1")
    assert backend.remove(blob_name(saved.files["state.json"].sha256, f"v1/work/{NAME}/blob"))
    with caplog.at_level(logging.WARNING):
        assert area.restore(tmp_path / "target") is None
    assert f"v1/work/{NAME}/snapshot.json" in caplog.text and "state.json (blob " in caplog.text
    assert not (tmp_path / "target").exists()
    assert area.newest() is None
    assert any("/snapshot.json" in listed.name for listed in backend.list(f"v1/quarantine/work/{NAME}/"))
    # The same writer goes on, and what was left over goes with its save.
    again = area.save(write_files(tmp_path / "second", "second", same="other"), "2")
    assert len(names(backend)) == 1 + len(again.files)
    assert area.restore(tmp_path / "target") == again


def test_changed_byte_is_found(folder_place: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    area = WorkArea(folder_place.store.backend, NAME)
    saved = area.save(write_files(tmp_path / "source", "first"), "1")
    entry = saved.files["adapter.safetensors"]
    blob = folder_place.root / blob_name(entry.sha256, f"v1/work/{NAME}/blob")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with caplog.at_level(logging.WARNING):
        assert area.restore(tmp_path / "target") is None
    assert "adapter.safetensors (blob " in caplog.text and f"expected sha256 {entry.sha256}" in caplog.text
    assert not blob.exists()


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda raw: b"not json", "Invalid JSON"),
        (lambda raw: raw[:-20], "Invalid JSON"),
        (lambda raw: raw.replace(NAME.encode(), b"sweep/other/t000"), "belongs to other work, sweep/other/t000"),
        (lambda raw: raw.replace(b"state.json", b"../../x.json"), "is no path inside an artifact"),
        (lambda raw: raw.replace(b'"label":"1"', b'"label":"../up"'), "label"),
        (lambda raw: raw.replace(b'"schema_version":1', b'"schema_version":2'), "schema_version"),
        (lambda raw: raw.replace(b'{"created"', b'{"added":1,"created"'), "added"),
    ],
)
def test_unsound_record_is_named_and_set_aside(
    folder_place: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, edit: Callable[[bytes], bytes], fault: str
) -> None:
    backend = folder_place.store.backend
    WorkArea(backend, NAME).save(write_files(tmp_path / "source", "first"), "1")
    record = backend.read(snapshot_name(NAME))
    assert parse_snapshot(record.data, NAME).label == "1"
    edited = edit(record.data)
    assert edited != record.data
    with pytest.raises(CorruptArtifactError, match=fault):
        parse_snapshot(edited, NAME)
    assert backend.replace(snapshot_name(NAME), edited, record.tag)
    with caplog.at_level(logging.WARNING):
        assert WorkArea(backend, NAME).take() is None
    assert fault in caplog.text and snapshot_name(NAME) in caplog.text
    assert backend.read(snapshot_name(NAME)) is None


# --- what is refused


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/..", "a/.b", "a b", "a/blob", "snapshot.json/a"])
def test_name_that_is_not_safe_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot name work in a store"):
        WorkArea(LocalFolder(tmp_path), name)


def test_what_must_not_be_stored_is_refused_and_the_snapshot_stays(
    backend: Backend, area: WorkArea, tmp_path: Path
) -> None:
    saved = area.save(write_files(tmp_path / "source", "first"), "1")
    (tmp_path / "source" / "model.pkl").write_bytes(b"\x80\x04.")
    before = names(backend)
    with pytest.raises(StoreError, match=r"model\.pkl, which must not be stored"):
        area.save(tmp_path / "source", "2")
    with pytest.raises(StoreError, match="wrote no files"):
        area.save(tmp_path / "absent", "2")
    (tmp_path / "source" / "model.pkl").unlink()
    with pytest.raises(StoreError, match=r"'\.\./2' is no label"):
        area.save(tmp_path / "source", "../2")
    assert area.newest() == saved
    assert names(backend) == before


def test_target_that_is_in_use_is_refused_and_stays(area: WorkArea, tmp_path: Path) -> None:
    area.save(write_files(tmp_path / "source", "first"), "1")
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(StoreError, match=f"{target}"):
        area.restore(target)
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_bucket_leaves_no_copies_on_this_machine(bucket_place: Any, tmp_path: Path) -> None:
    area = WorkArea(bucket_place.store.backend, NAME)
    area.save(write_files(tmp_path / "source", "first"), "1")
    assert WorkArea(bucket_place.reader().backend, NAME).restore(tmp_path / "target") is not None
    caches = tmp_path / "caches"
    assert [path for path in caches.rglob("*") if path.is_file() and "/v1/work/" in str(path)] == []
