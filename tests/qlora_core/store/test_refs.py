"""Pins and references: who may keep what under which name, and what happens where a record is not sound."""

import threading
import time
from pathlib import Path

import pytest

from qlora_core.errors import ConfigError, CorruptArtifactError, StoreError
from qlora_core.store.contents import seal
from qlora_core.store.layout import BLOBS, manifest_name
from qlora_core.store.lease import finish
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest
from qlora_core.store.refs import add_pin, add_ref, list_refs, read_ref, remove_pin, remove_ref, set_ref
from qlora_core.store.store import GC_LEASE, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalFolder(tmp_path / "store"))


def publish(store: Store, stage: str, text: str) -> Manifest:
    with store.backend.staging() as folder:
        (folder / "result.json").write_text(text)
        files = seal(folder)
        manifest = new_manifest(stage, "1", {"text": text}, {}, files)
        store.backend.send(folder, files, BLOBS)
    finish(store.backend, manifest)
    return manifest


def test_pin_is_listed_and_goes_when_it_is_taken_away(store: Store) -> None:
    address = publish(store, "sweep", "1").address
    add_pin(store.backend, "audit-2026", [address], note="what the report quotes")
    (pin,) = list_refs(store.backend)
    assert (pin.kind, pin.name, pin.addresses, pin.note) == ("pin", "audit-2026", (address,), "what the report quotes")
    remove_pin(store.backend, "audit-2026")
    assert list_refs(store.backend) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "ä", "a" * 101, "a\n"])
def test_unsafe_pin_name_is_refused_with_what_is_allowed(store: Store, name: str) -> None:
    address = publish(store, "sweep", "1").address
    with pytest.raises(ConfigError, match="letters, digits"):
        add_pin(store.backend, name, [address])
    with pytest.raises(ConfigError, match="no pin"):
        remove_pin(store.backend, name)
    assert not list(store.backend.list("v1/pin/"))


def test_pin_again_is_the_same_pin_and_another_under_its_name_is_refused(store: Store) -> None:
    first, second = publish(store, "sweep", "1").address, publish(store, "sweep", "2").address
    assert add_pin(store.backend, "keep", [first]) == add_pin(store.backend, "keep", [first])
    with pytest.raises(ConfigError, match="qlora store unpin keep"):
        add_pin(store.backend, "keep", [second])


def test_unpinning_what_is_not_pinned_names_the_pins(store: Store) -> None:
    add_pin(store.backend, "keep", [publish(store, "sweep", "1").address])
    with pytest.raises(ConfigError, match=r"no pin 'kep'.*keep"):
        remove_pin(store.backend, "kep")


def test_reference_is_written_once_and_only_ever_grows(store: Store) -> None:
    first, second = publish(store, "sweep", "1").address, publish(store, "sweep", "2").address
    one = add_ref(store.backend, "model", "assistant/run é", [first])
    assert add_ref(store.backend, "model", "assistant/run é", [first]) == one
    both = add_ref(store.backend, "model", "assistant/run é", [second])
    assert set(both.addresses) == {first, second}
    assert both.created == one.created
    assert list_refs(store.backend) == [both]
    assert remove_ref(store.backend, "model", "assistant/run é")
    assert not remove_ref(store.backend, "model", "assistant/run é")


def test_reference_that_is_set_keeps_only_what_was_named_last(store: Store) -> None:
    first, second = publish(store, "sweep", "1").address, publish(store, "sweep", "2").address
    assert read_ref(store.backend, "decided", "assistant") is None
    set_ref(store.backend, "decided", "assistant", [first], "run 1")
    set_ref(store.backend, "decided", "assistant", [second], "run 2")
    found = read_ref(store.backend, "decided", "assistant")
    assert found is not None and (found.addresses, found.note) == ((second,), "run 2")
    with pytest.raises(StoreError, match="kind 'pin'"):
        set_ref(store.backend, "pin", "assistant", [first])


def test_what_is_gone_cannot_be_kept(store: Store) -> None:
    manifest = publish(store, "sweep", "1")
    store.backend.remove(manifest_name(manifest.address))
    for add in (lambda: add_pin(store.backend, "keep", [manifest.address]),
                lambda: add_ref(store.backend, "model", "m/1", [manifest.address])):  # fmt: skip
        with pytest.raises(StoreError, match=manifest.address):
            add()
    assert list_refs(store.backend) == []


def test_what_is_no_address_cannot_be_kept(store: Store) -> None:
    with pytest.raises(StoreError, match="no address"):
        add_ref(store.backend, "model", "m/1", ["v1/stage/../../etc/passwd"])


def test_pin_waits_for_a_collection_that_did_not_see_it(store: Store) -> None:
    manifest = publish(store, "sweep", "1")
    faults: list[str] = []

    def pin() -> None:
        try:
            add_pin(store.backend, "late", [manifest.address])
        except StoreError as fault:
            faults.append(str(fault))

    with store.leases.attempt(GC_LEASE) as lease:
        assert lease is not None
        waiting = threading.Thread(target=pin)
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        store.backend.remove(manifest_name(manifest.address))
    waiting.join(10)
    assert manifest.address in faults[0]
    assert list_refs(store.backend) == []


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff\xfe"])
def test_unreadable_record_is_an_error_never_nothing(store: Store, data: bytes) -> None:
    store.backend.create("v1/pin/keep.json", data)
    with pytest.raises(CorruptArtifactError, match=r"v1/pin/keep\.json"):
        list_refs(store.backend)


def test_record_under_another_name_is_unsound(store: Store) -> None:
    add_pin(store.backend, "keep", [publish(store, "sweep", "1").address])
    record = store.backend.read("v1/pin/keep.json")
    assert record is not None
    store.backend.create("v1/pin/other.json", record.data)
    with pytest.raises(CorruptArtifactError, match=r"v1/pin/other\.json"):
        list_refs(store.backend)
