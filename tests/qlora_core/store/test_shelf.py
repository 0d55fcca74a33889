"""Documents under digests: kept once, found by others, never believed unread."""

import logging
from pathlib import Path

import pytest

from qlora_core.digest import digest_bytes
from qlora_core.errors import StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.backend import Record
from qlora_core.store.layout import VERDICTS
from qlora_core.store.local import LocalFolder
from qlora_core.store.shelf import Shelf
from qlora_core.store.store import Store

ONE, OTHER = digest_bytes(b"one"), digest_bytes(b"other")


def shelf(root: Path) -> Shelf:
    return Shelf(LocalFolder(root), VERDICTS)


def test_first_document_under_a_digest_stays(tmp_path: Path) -> None:
    shelf(tmp_path).put(ONE, {"slot": "first", "reason": None})
    shelf(tmp_path).put(ONE, {"slot": "second", "reason": None})

    assert shelf(tmp_path).get(ONE) == {"slot": "first", "reason": None}
    assert shelf(tmp_path).get(OTHER) is None


def test_many_are_those_that_are_there(tmp_path: Path) -> None:
    shelf(tmp_path).put(ONE, {"slot": "tie"})

    assert shelf(tmp_path).get_many([ONE, OTHER, ONE]) == {ONE: {"slot": "tie"}}
    assert shelf(tmp_path).get_many([]) == {}


@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
def test_damaged_document_is_named_and_never_given_out(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shelf(tmp_path).put(ONE, {"slot": "first"})
    (file,) = (tmp_path / VERDICTS).rglob("*.json")
    text = file.read_text()
    file.write_text({"flip": text.replace("first", "second"), "cut": text[:-9], "swap": '["first"]'}[damage])

    with caplog.at_level(logging.WARNING):
        assert shelf(tmp_path).get(ONE) is None

    assert file.name in caplog.text
    assert not file.exists()
    shelf(tmp_path).put(ONE, {"slot": "first"})
    assert shelf(tmp_path).get(ONE) == {"slot": "first"}


def test_number_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        shelf(tmp_path).put(ONE, {"cost": float("nan")})
    assert shelf(tmp_path).get(ONE) is None


class MendedMeanwhile(LocalFolder):
    """A folder in which another process puts a sound document in the place of what was just read."""

    def read(self, name: str) -> Record | None:
        found = super().read(name)
        if found is not None and found.data == b"damaged":
            (self.pool.root / name).unlink(missing_ok=True)
            Shelf(LocalFolder(self.pool.root), VERDICTS).put(ONE, {"slot": "sound"})
        return found


def test_only_what_was_read_is_set_aside(tmp_path: Path) -> None:
    backend = MendedMeanwhile(tmp_path)
    backend.create(f"{VERDICTS}/{ONE[:2]}/{ONE}.json", b"damaged")
    assert Shelf(backend, VERDICTS).get(ONE) is None
    assert shelf(tmp_path).get(ONE) == {"slot": "sound"}
    assert list(backend.list("v1/quarantine/")) == []


class WithoutQuarantine(LocalFolder):
    """A folder in which nothing can be put into quarantine."""

    def create(self, name: str, data: bytes) -> str | None:
        if name.startswith("v1/quarantine/"):
            raise StoreError("403")
        return super().create(name, data)


def test_document_that_cannot_be_set_aside_stays_and_is_a_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend, name = WithoutQuarantine(tmp_path), f"{VERDICTS}/{ONE[:2]}/{ONE}.json"
    backend.create(name, b"damaged")
    assert Shelf(backend, VERDICTS).get(ONE) is None
    assert "is not moved to quarantine: 403" in caplog.text
    record = backend.read(name)
    assert record is not None
    assert record.data == b"damaged"


def test_artifact_that_cannot_be_set_aside_is_a_miss_and_loses_nothing(tmp_path: Path) -> None:
    backend, key = WithoutQuarantine(tmp_path), StageKey("sweep", "1", {}, {})
    backend.create(f"{key.address}/manifest.json", b"damaged")
    assert Store(backend).get(key) is None
    record = backend.read(f"{key.address}/manifest.json")
    assert record is not None
    assert record.data == b"damaged"
