"""Documents under digests: kept once, found by others, never believed unread."""

import logging
from pathlib import Path

import pytest

from qlora_core.digest import digest_bytes
from qlora_core.store.layout import VERDICTS
from qlora_core.store.local import LocalFolder
from qlora_core.store.shelf import Shelf

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
