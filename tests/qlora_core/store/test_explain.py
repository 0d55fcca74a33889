"""Why a stage ran again: what differs is found, in settings, versions and inputs of inputs."""

from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import ConfigError
from qlora_core.store.catalog import find_address
from qlora_core.store.contents import seal
from qlora_core.store.explain import explain, explain_lines
from qlora_core.store.layout import BLOBS, blob_name
from qlora_core.store.lease import finish
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest
from qlora_core.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalFolder(tmp_path / "store"))


def publish(
    store: Store, stage: str, config: dict[str, Any], inputs: dict[str, str], version: str = "1", text: str = ""
) -> Manifest:
    with store.backend.staging() as folder:
        (folder / "result.json").write_text(text or f"{stage} {version} {config} {inputs}")
        files = seal(folder)
        manifest = new_manifest(stage, version, config, inputs, files)
        store.backend.send(folder, files, BLOBS)
    finish(store.backend, manifest)
    return manifest


def test_changed_settings_are_named_by_path_with_both_values(store: Store) -> None:
    old = {"data": {"max_length": 512, "sources": ["a", "b"]}, "seed": 1, "gone": True}
    new = {"data": {"max_length": 1024, "sources": ["a"]}, "seed": 1.0, "fresh": None}
    first = publish(store, "curate", old, {})
    second = publish(store, "curate", new, {})
    explained = explain(store, second.address)
    assert explained["against"]["key"] == first.key
    assert explained["config"] == [
        {"path": "data.max_length", "old": 512, "new": 1024},
        {"path": "data.sources", "old": ["a", "b"], "new": ["a"]},
        {"path": "fresh", "new": None},
        {"path": "gone", "old": True},
        {"path": "seed", "old": 1, "new": 1.0},
    ]
    assert explain_lines(explained)[1:] == [
        "data.max_length: 512 -> 1024",
        'data.sources: ["a", "b"] -> ["a"]',
        "fresh: (absent) -> null",
        "gone: true -> (absent)",
        "seed: 1 -> 1.0",
    ]


def test_changed_source_is_found_through_two_stages(store: Store) -> None:
    curated = [publish(store, "curate", {}, {"sources/dolly.json": letter * 64}) for letter in "37"]
    swept = [publish(store, "sweep", {}, {"base": "b" * 64, "curate": each.digest}) for each in curated]
    evaluated = [publish(store, "evaluate", {}, {"sweep": each.digest}, version=str(n)) for n, each in enumerate(swept)]
    explained = explain(store, evaluated[1].address)
    assert explained["version"] == {"old": "0", "new": "1"}
    (changed,) = explained["inputs"]
    assert (changed["name"], changed["because"]["new"]) == ("sweep", swept[1].key)
    assert explain_lines(explained)[1:] == [
        "version: 0 -> 1",
        f"input sweep: {swept[0].digest[:12]}… -> {swept[1].digest[:12]}…",
        f"    input curate: {curated[0].digest[:12]}… -> {curated[1].digest[:12]}…",
        "        input sources/dolly.json: 333333333333… -> 777777777777…",
    ]


def test_added_and_removed_inputs_are_told(store: Store) -> None:
    publish(store, "sweep", {}, {"a": "none"})
    second = publish(store, "sweep", {}, {"b": "none"})
    assert explain_lines(explain(store, second.address))[1:] == [
        "input a: none -> (absent)",
        "input b: (absent) -> none",
    ]


def test_comparison_is_with_the_nearest_earlier_one_and_not_with_another_projects(store: Store) -> None:
    config = {"rank": 8, "train": {"rate": 0.1, "steps": 100}, "order": [1, 2]}
    base = {"base": "b" * 64, "curate": "c" * 64}
    other = {"rank": 64, "train": {"rate": 0.5, "steps": 9, "warmup": 1}, "order": [1]}
    own = publish(store, "sweep", config, base)
    theirs = publish(store, "sweep", other, {"base": "e" * 64, "rows": "f" * 64})
    new = publish(store, "sweep", {**config, "rank": 16}, {**base, "curate": "d" * 64})
    explained = explain(store, new.address)
    assert explained["against"] == {"key": own.key, "created": own.created.isoformat(), "nearest_of": 2}
    lines = explain_lines(explained)
    assert f"differs from {own.key[:12]} of 20" in lines[0]
    assert "the nearest of 2 earlier ones (--against KEY for another), in" in lines[0]
    assert lines[1:] == ["rank: 8 -> 16", "input curate: cccccccccccc… -> dddddddddddd…"]
    given = explain(store, new.address, theirs.address)
    assert given["against"] == {"key": theirs.key, "created": theirs.created.isoformat()}
    assert explain_lines(given)[0].endswith(f"{theirs.created.isoformat()[:16].replace('T', ' ')} in")


def test_version_counts_as_much_as_a_setting(store: Store) -> None:
    older = publish(store, "sweep", {"rank": 8, "rate": 0.1}, {}, version="2")
    publish(store, "sweep", {"rank": 8, "rate": 0.2}, {}, version="1")
    new = publish(store, "sweep", {"rank": 9, "rate": 0.1}, {}, version="2")
    assert explain(store, new.address)["against"]["key"] == older.key


def test_comparison_is_with_the_newest_among_equals_unless_another_is_named(store: Store) -> None:
    made = [publish(store, "sweep", {"seed": n}, {}) for n in range(4)]
    publish(store, "curate", {"seed": 9}, {})
    assert explain(store, made[2].address)["against"]["key"] == made[1].key
    assert explain(store, made[2].address, made[3].address)["against"]["key"] == made[3].key
    first = explain(store, made[0].address)
    assert first["against"] is None
    assert "first of its stage" in explain_lines(first)[0]


def test_another_stage_cannot_be_compared_with(store: Store) -> None:
    one, other = publish(store, "sweep", {}, {}), publish(store, "curate", {}, {})
    with pytest.raises(ConfigError, match="curate"):
        explain(store, one.address, other.address)


def test_what_was_found_corrupt_before_is_told(store: Store) -> None:
    made = publish(store, "sweep", {}, {}, text="fresh")
    assert explain(store, made.address)["set_aside"] == []
    store.backend.set_aside(f"{made.address}/manifest.json")
    store.backend.set_aside(blob_name(made.files["result.json"].sha256))
    again = publish(store, "sweep", {}, {}, text="fresh")
    explained = explain(store, again.address)
    assert len(explained["set_aside"]) == 2
    assert "was found corrupt once" in explain_lines(explained)[-1]


def test_inputs_that_lead_in_a_circle_end(store: Store) -> None:
    one = publish(store, "sweep", {"n": 1}, {}, text="one")
    two = publish(store, "sweep", {"n": 2}, {}, text="two")
    first = publish(store, "sweep", {"n": 3}, {"self": one.digest, "other": two.digest}, text="one")
    second = publish(store, "sweep", {"n": 4}, {"self": two.digest, "other": one.digest}, text="two")
    assert explain(store, second.address, first.address)["config"] == [{"path": "n", "old": 3, "new": 4}]


def test_key_may_be_shortened_as_far_as_it_is_clear(store: Store) -> None:
    made = [publish(store, "sweep", {"n": n}, {}) for n in range(3)]
    assert find_address(store.backend, made[0].key[:6]) == made[0].address
    assert find_address(store.backend, f"sweep/{made[0].key}") == made[0].address
    with pytest.raises(ConfigError, match="6 hex digits"):
        find_address(store.backend, made[0].key[:5])
    with pytest.raises(ConfigError, match=made[2].key[:12]):
        find_address(store.backend, "ffffff" if not made[0].key.startswith("f") else "000000")


def test_ambiguous_key_lists_what_it_may_mean(store: Store) -> None:
    keys = ["abcdef" + "0" * 58, "abcdef" + "1" * 58]
    for key in keys:
        store.backend.create(f"v1/stage/sweep/{key}/manifest.json", b"{}")
    with pytest.raises(ConfigError, match=f"2 keys: sweep/{keys[0][:20]}, sweep/{keys[1][:20]}"):
        find_address(store.backend, "abcdef")
