"""Artifacts as a file: the same bytes each time, whole on arrival, and nothing taken from a hostile or damaged file."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.digest import digest_file
from qlora_core.errors import ConfigError, StoreError
from qlora_core.store.contents import seal
from qlora_core.store.exchange import export_artifacts, import_artifacts
from qlora_core.store.layout import BLOBS, blob_name, manifest_name
from qlora_core.store.lease import finish
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import PIECE_BYTES, FileEntry, Manifest, files_digest, new_manifest
from qlora_core.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalFolder(tmp_path / "store"))


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """The store that things are imported into."""
    return Store(LocalFolder(tmp_path / "other"))


def publish(store: Store, stage: str, inputs: dict[str, str], files: dict[str, bytes]) -> Manifest:
    with store.backend.staging() as folder:
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        sealed = seal(folder)
        manifest = new_manifest(stage, "1", {"rate": 0.1}, inputs, sealed)
        store.backend.send(folder, sealed, BLOBS)
    finish(store.backend, manifest)
    return manifest


@pytest.fixture
def rows(store: Store) -> Manifest:
    """What `swept` was made from, with a file in common."""
    return publish(store, "curate", {"sources/a.json": "a" * 64}, {"rows.jsonl": b"{}\n" * 900, "shared.json": b"{}"})


@pytest.fixture
def swept(store: Store, rows: Manifest) -> Manifest:
    """An artifact with a file of several pieces."""
    files = {"adapter/model.safetensors": b"w" * (PIECE_BYTES + 7), "adapter/copy.json": b"{}", "shared.json": b"{}"}
    return publish(store, "sweep", {"curate": rows.digest}, files)


def names(store: Store) -> list[str]:
    kinds = ("v1/stage/", "v1/blob/", "v1/quarantine/")
    return [listed.name for kind in kinds for listed in store.backend.list(kind)]


def test_artifact_arrives_whole_with_its_inputs(
    store: Store, other: Store, rows: Manifest, swept: Manifest, tmp_path: Path
) -> None:
    file = tmp_path / "adapter.tar"
    told = export_artifacts(store, swept.address, file, with_inputs=True)
    assert told["artifacts"] == [f"curate/{rows.key}", f"sweep/{swept.key}"]
    assert told["size_bytes"] == file.stat().st_size
    done = import_artifacts(other, file)
    assert done == {"imported": [f"curate/{rows.key}", f"sweep/{swept.key}"], "skipped": []}
    assert names(other) == names(store)
    arrived = other.get_at(swept.address)
    assert arrived is not None
    assert arrived.manifest == swept
    assert (arrived.path / "adapter/copy.json").read_bytes() == b"{}"


def test_what_is_there_already_is_skipped(store: Store, swept: Manifest, rows: Manifest, tmp_path: Path) -> None:
    export_artifacts(store, swept.address, tmp_path / "a.tar", with_inputs=True)
    store.backend.remove(manifest_name(swept.address))
    done = import_artifacts(store, tmp_path / "a.tar")
    assert done == {"imported": [f"sweep/{swept.key}"], "skipped": [f"curate/{rows.key}"]}
    assert import_artifacts(store, tmp_path / "a.tar")["imported"] == []


def test_export_has_the_same_bytes_each_time_and_any_tar_program_reads_it(
    store: Store, other: Store, swept: Manifest, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    export_artifacts(store, swept.address, first)
    import_artifacts(other, first)
    export_artifacts(other, swept.address, second)
    assert digest_file(first) == digest_file(second)
    with tarfile.open(first, "r:") as archive:
        members = archive.getmembers()
        manifest = archive.extractfile(members[0])
        assert manifest is not None
        assert json.loads(manifest.read())["key"] == swept.key
    assert [member.name for member in members] == [
        manifest_name(swept.address),
        *sorted(blob_name(entry.sha256) for entry in dict.fromkeys(swept.files.values())),
    ]
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}


def test_corrupt_artifact_is_not_exported_and_leaves_no_file(store: Store, swept: Manifest, tmp_path: Path) -> None:
    blob = tmp_path / "store" / blob_name(swept.files["shared.json"].sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"[]")
    before = {"old.tar": b"what was there before"}
    (tmp_path / "old.tar").write_bytes(before["old.tar"])
    with pytest.raises(StoreError, match=swept.key):
        export_artifacts(store, swept.address, tmp_path / "old.tar", force=True)
    assert (tmp_path / "old.tar").read_bytes() == before["old.tar"]
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))


def test_export_into_a_missing_folder_names_it(store: Store, swept: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/a\.tar: No such file or directory; .*make the folder first"):
        export_artifacts(store, swept.address, tmp_path / "missing" / "a.tar")


@pytest.mark.parametrize("kind", ["file", "folder", "link to nowhere"])
def test_export_replaces_what_is_there_only_if_forced(store: Store, swept: Manifest, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "report.pdf"
    if kind == "file":
        file.write_bytes(b"months of work")
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"report\.pdf is there already; .* --force"):
        export_artifacts(store, swept.address, file)
    assert kind != "file" or file.read_bytes() == b"months of work"
    if kind == "folder":
        with pytest.raises(ConfigError, match="it is a folder"):
            export_artifacts(store, swept.address, file, force=True)
    else:
        export_artifacts(store, swept.address, file, force=True)
        assert tarfile.is_tarfile(file)
    assert not list(tmp_path.glob(".*.part"))


def test_file_that_came_meanwhile_is_not_replaced(
    store: Store, swept: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.tar"
    real = os.fsync

    def sync(descriptor: int) -> None:
        file.write_bytes(b"of somebody else")
        real(descriptor)

    monkeypatch.setattr("qlora_core.store.exchange.os.fsync", sync)
    with pytest.raises(ConfigError, match="there already"):
        export_artifacts(store, swept.address, file)
    assert file.read_bytes() == b"of somebody else"


Members = list[tuple[tarfile.TarInfo, bytes]]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Members:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return [(info, content)]


def write_tar(file: Path, members: Members, form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(file, "w", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if info.type == tarfile.REGTYPE else None)
    return file


def artifact(content: bytes = b"{}", **changes: Any) -> Members:
    """A manifest of one file, and its blob; `changes` are what an unsound one says."""
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    manifest = new_manifest("sweep", "1", {}, {}, {"result.json": entry})
    name = manifest_name(manifest.address)
    return [*member(name, manifest.model_copy(update=changes).to_json()), *member(blob_name(entry.sha256), content)]


ENTRY = FileEntry(sha256=hashlib.sha256(b"{}").hexdigest(), size_bytes=2)


def resealed(paths: dict[str, FileEntry], blobs: Iterable[bytes]) -> Members:
    """A manifest whose digest and checksum are right, whatever it says of its files."""
    sound = new_manifest("sweep", "1", {}, {}, {"result.json": ENTRY})
    manifest = sound.model_copy(update={"files": paths, "digest": files_digest(paths)})
    found = member(manifest_name(manifest.address), manifest.to_json())
    for blob in blobs:
        found += member(blob_name(hashlib.sha256(blob).hexdigest()), blob)
    return found


BLOB = blob_name(hashlib.sha256(b"{}").hexdigest())
HOSTILE: dict[str, tuple[Members, str]] = {
    "empty": ([], "no artifact"),
    "climbing out": ([*artifact(), *member("../escaped", b"x")], r"\.\./escaped"),
    "climbing within": ([*artifact(), *member(f"v1/blob/../../../{'a' * 64}", b"x")], r"\.\./"),
    "absolute": ([*artifact(), *member("/tmp/escaped", b"x")], "/tmp/escaped"),
    "absolute blob": ([*artifact(), *member(f"/{BLOB}", b"{}")], f"/{BLOB}"),
    "blob in a wrong folder": ([*member(f"v1/blob/zz/{'a' * 64}", b"x")], "v1/blob/zz"),
    "symbolic link": ([*artifact(), *member(BLOB, kind=tarfile.SYMTYPE, link="/etc/passwd")], "symbolic link"),
    "hard link": ([*artifact(), *member(BLOB, kind=tarfile.LNKTYPE, link="v1/x")], "hard link"),
    "device": ([*artifact(), *member(BLOB, kind=tarfile.CHRTYPE)], "device"),
    "fifo": ([*artifact(), *member(BLOB, kind=tarfile.FIFOTYPE)], "no plain file"),
    "folder": ([*artifact(), *member("v1/blob/", kind=tarfile.DIRTYPE)], "folder"),
    "twice": ([*artifact(), *member(BLOB, b"{}")], "twice"),
    "a lease": ([*artifact(), *member("v1/lease/store/gc.json", b"{}")], r"v1/lease/store/gc\.json"),
    "a pin": ([*artifact(), *member("v1/pin/x.json", b"{}")], "v1/pin"),
    "other content than its name": ([*artifact()[:1], *member(BLOB, b"[]")], "damaged"),
    "blob missing": (artifact()[:1], "missing"),
    "blob of nobody": ([*artifact(), *member(blob_name(hashlib.sha256(b"x").hexdigest()), b"x")], "no manifest"),
    "another key": (artifact(config={"rate": 1}), "not a sound manifest"),
    "no JSON": (member(f"v1/stage/sweep/{'0' * 64}/manifest.json", b"{"), "not JSON"),
    "another's manifest": (
        [*member(f"v1/stage/sweep/{'0' * 64}/manifest.json", artifact()[0][1]), *artifact()[1:]],
        "another artifact",
    ),
    "pickle": (resealed({"model.pkl": ENTRY}, [b"{}"]), r"model\.pkl"),
    "wrong size": (resealed({"a.json": ENTRY.model_copy(update={"size_bytes": 3})}, [b"{}"]), r"a\.json"),
    "file where a folder is": (resealed({"LICENSE": ENTRY, "LICENSE/a.json": ENTRY}, [b"{}"]), "LICENSE/a"),
    "long name": ([*artifact(), *member(f"v1/{'x' * 300}", b"x")], "no plain file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_by_name_and_nothing_is_published(other: Store, tmp_path: Path, case: str) -> None:
    members, named = HOSTILE[case]
    file = write_tar(tmp_path / "hostile.tar", members)
    with pytest.raises(StoreError, match=named):
        import_artifacts(other, file)
    assert names(other) == []
    assert not list(tmp_path.glob("escaped*"))
    assert not list((tmp_path / "other" / "v1" / "tmp").glob("*"))


def test_the_file_that_hostile_ones_are_made_from_is_taken(other: Store, tmp_path: Path) -> None:
    assert import_artifacts(other, write_tar(tmp_path / "a.tar", artifact()))["imported"]
    assert import_artifacts(other, write_tar(tmp_path / "b.tar", artifact()[::-1]))["skipped"]


def test_pieces_are_compared_though_the_file_matches(other: Store, tmp_path: Path) -> None:
    content = b"w" * (PIECE_BYTES + 1)
    pieces = tuple(hashlib.sha256(part).hexdigest() for part in (content[:PIECE_BYTES], b"w"))
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content), pieces=pieces[::-1])
    file = write_tar(tmp_path / "a.tar", resealed({"a.safetensors": entry}, [content]))
    with pytest.raises(StoreError, match=r"pieces of a\.safetensors"):
        import_artifacts(other, file)
    assert names(other) == []


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_name_given_by_an_extension_is_not_believed(other: Store, tmp_path: Path, form: int) -> None:
    members = artifact()
    members[1][0].pax_headers = {"path": "../escaped"}
    members += member(f"../{'x' * 200}", b"x")
    with pytest.raises(StoreError, match="no plain file"):
        import_artifacts(other, write_tar(tmp_path / "a.tar", members, form))
    assert names(other) == []


def test_cut_or_damaged_file_is_refused_wherever_it_is_cut(
    store: Store, other: Store, rows: Manifest, tmp_path: Path
) -> None:
    export_artifacts(store, rows.address, tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    for length in {*range(0, len(whole) - 512, 499), *range(0, len(whole) - 512, 512)}:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"cut\.tar"):
            import_artifacts(other, tmp_path / "cut.tar")
    assert names(other) == []
    for at in range(0, len(whole), 97):
        (tmp_path / "cut.tar").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StoreError, match=r"cut\.tar"):
            import_artifacts(other, tmp_path / "cut.tar")
    assert names(other) == []


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b" + bytes(600), b"not a tar file at all" * 50])
def test_what_is_no_tar_is_named(other: Store, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.tar"):
        import_artifacts(other, tmp_path / "a.tar")


def test_missing_file_is_named(other: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.tar") as refused:
        import_artifacts(other, tmp_path / "none.tar")
    assert "`store`" not in str(refused.value)
    with pytest.raises(ConfigError, match="it is a folder"):
        import_artifacts(other, tmp_path)
    assert not Path(other.location).exists()


def test_import_gives_way_to_a_living_producer(store: Store, rows: Manifest, other: Store, tmp_path: Path) -> None:
    export_artifacts(store, rows.address, tmp_path / "a.tar")
    with (
        other.leases.attempt(rows.address.removeprefix("v1/")),
        pytest.raises(StoreError, match="being built"),
    ):
        import_artifacts(other, tmp_path / "a.tar")
    assert import_artifacts(other, tmp_path / "a.tar")["imported"]


def test_sizes_beyond_the_standards_digits_can_be_told(tmp_path: Path) -> None:
    from qlora_core.store.tar import TarReader, _header

    header = _header(BLOB, 9 << 30)
    (name, size_bytes) = next(iter(TarReader(io.BytesIO(header), tmp_path)))
    assert (name, size_bytes) == (BLOB, 9 << 30)
