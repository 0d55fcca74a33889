"""Graphs of what was made from what."""

from pathlib import Path

import pytest

from qlora_core.errors import StoreError
from qlora_core.store.contents import seal
from qlora_core.store.layout import BLOBS
from qlora_core.store.lease import finish
from qlora_core.store.lineage import lineage, lineage_of, lineage_of_all
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest
from qlora_core.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalFolder(tmp_path / "store"))


def publish(store: Store, stage: str, name: str, inputs: dict[str, str], text: str | None = None) -> Manifest:
    with store.backend.staging() as folder:
        (folder / "result.json").write_text(text or f"{stage} {name}")
        files = seal(folder)
        manifest = new_manifest(stage, "1", {"name": name}, inputs, files)
        store.backend.send(folder, files, BLOBS)
    finish(store.backend, manifest)
    return manifest


def test_graph_leads_from_outside_files_to_the_artifact(store: Store) -> None:
    rows = publish(store, "curate", "a", {"sources/rows.json": "r" * 64, "template": "none"})
    base = publish(store, "quantize", "a", {"base": "b" * 64})
    swept = publish(store, "sweep", "a", {"curate": rows.digest, "quantize": base.digest})
    publish(store, "evaluate", "later", {"sweep": swept.digest})
    graph = lineage_of(store, swept.address)
    made = {node["key"]: node for node in graph["nodes"] if node["kind"] == "artifact"}
    outside = {node["name"]: node["digest"] for node in graph["nodes"] if node["kind"] == "external"}
    assert set(made) == {rows.key, base.key, swept.key}
    assert outside == {"sources/rows.json": "r" * 64, "template": "none", "base": "b" * 64}
    assert made[rows.key] == {
        "id": rows.key, "kind": "artifact", "stage": "curate", "key": rows.key, "digest": rows.digest,
        "created": rows.created.isoformat(), "size_bytes": rows.size_bytes,
    }  # fmt: skip
    assert {"from": rows.key, "to": swept.key, "name": "curate"} in graph["edges"]
    ids = {node["id"] for node in graph["nodes"]}
    assert {edge[end] for edge in graph["edges"] for end in ("from", "to")} == ids
    assert graph["nodes"][-1]["key"] == swept.key


def test_graph_of_all_has_every_artifact_once(store: Store) -> None:
    rows = publish(store, "curate", "a", {})
    swept = [publish(store, "sweep", str(n), {"curate": rows.digest}) for n in range(3)]
    graph = lineage_of_all(store)
    assert [node["key"] for node in graph["nodes"]] == [rows.key, *(each.key for each in swept)]
    assert len(graph["edges"]) == 3


def test_of_several_artifacts_with_the_same_files_the_one_just_before_is_the_source(store: Store) -> None:
    first = publish(store, "curate", "first", {}, text="same")
    second = publish(store, "curate", "second", {}, text="same")
    swept = publish(store, "sweep", "a", {"curate": first.digest})
    publish(store, "curate", "third", {}, text="same")
    assert first.digest == second.digest
    assert lineage_of_all(store)["edges"] == [{"from": second.key, "to": swept.key, "name": "curate"}]


def test_input_whose_artifact_is_gone_counts_as_from_outside() -> None:
    manifest = new_manifest("sweep", "1", {}, {"curate": "c" * 64}, _entries())
    graph = lineage([manifest])
    assert [node["kind"] for node in graph["nodes"]] == ["external", "artifact"]


def test_artifact_that_names_its_own_digest_as_input_ends_the_search(store: Store) -> None:
    files = _entries()
    plain = new_manifest("sweep", "1", {}, {}, files)
    manifest = new_manifest("sweep", "1", {}, {"itself": plain.digest}, files)
    finish(store.backend, manifest)
    assert [edge["name"] for edge in lineage_of(store, manifest.address)["edges"]] == ["itself"]


def test_unknown_artifact_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match="qlora store ls"):
        lineage_of(store, f"v1/stage/sweep/{'0' * 64}")


def _entries():  # noqa: ANN202 - entries by path
    from qlora_core.store.manifest import FileEntry

    return {"result.json": FileEntry(sha256="a" * 64, size_bytes=1)}
