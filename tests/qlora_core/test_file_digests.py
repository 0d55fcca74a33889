"""Remembered digests: used while the file is what it was, and never a moment longer."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from qlora_core import file_digests
from qlora_core.file_digests import FileDigests


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def settle(path: Path) -> None:
    """Make the file look modified a minute ago; its change time is the system's own and cannot be set."""
    past = time.time() - 60
    os.utime(path, (past, past))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read in full."""
    seen: list[Path] = []
    real = file_digests.digest_file

    def counted(path: Path) -> str:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(file_digests, "digest_file", counted)
    return seen


def test_settled_file_is_read_once_over_two_processes(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "_SETTLED_NS", 0)
    path, memory = tmp_path / "rows.json", tmp_path / "work" / "memory.json"
    path.write_bytes(b"rows")
    for _ in range(2):
        digests = FileDigests(memory)
        assert digests.digest(path) == sha256(b"rows")
        digests.save()
    assert reads == [path]


def test_file_written_a_moment_ago_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"rows")
    digests = FileDigests(tmp_path / "memory.json")
    digests.digest(path)
    digests.save()
    assert digests.digest(path) == sha256(b"rows") and len(reads) == 2
    assert not (tmp_path / "memory.json").exists()


def test_change_that_keeps_size_and_modification_time_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "_SETTLED_NS", 0)
    path = tmp_path / "rows.json"
    path.write_bytes(b"aaaa")
    settle(path)
    times = path.stat()
    digests = FileDigests(tmp_path / "memory.json")
    assert digests.digest(path) == sha256(b"aaaa")
    time.sleep(0.02)
    path.write_bytes(b"bbbb")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests.digest(path) == sha256(b"bbbb")


@pytest.mark.parametrize("text", ["", "[]", '{"x": 1}', "not json"])
def test_damaged_memory_is_as_good_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory.json").write_text(text)
    (tmp_path / "rows.json").write_bytes(b"rows")
    digests = FileDigests(tmp_path / "memory.json")
    assert digests.digest(tmp_path / "rows.json") == sha256(b"rows")


def test_memory_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "_SETTLED_NS", 0)
    (tmp_path / "rows.json").write_bytes(b"rows")
    digests = FileDigests(tmp_path / "memory.json")
    digests.digest(tmp_path / "rows.json")
    digests.save()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["memory.json", "rows.json"]
    ((_, digest),) = json.loads((tmp_path / "memory.json").read_text()).values()
    assert digest == sha256(b"rows")
