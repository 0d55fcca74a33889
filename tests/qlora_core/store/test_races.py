"""Fifty processes that want one artifact at the same moment: one builds it, the others are given what it built."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_core.store.artifact import StageKey
from qlora_core.store.layout import blob_name
from qlora_core.store.store import Store, open_store

RACE = Path(__file__).parent / "programs" / "race.py"
KEY = StageKey("sweep", "1", {}, {})
RACERS = 50


def race(root: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """Who built, and what each was given."""
    done = subprocess.run([sys.executable, RACE, str(root), str(RACERS)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (root / "answers").read_text().splitlines()]
    builders = [int(line) for line in (root / "builds").read_text().splitlines()] if (root / "builds").exists() else []
    return builders, answers


def store_of(root: Path) -> Store:
    return open_store(str(root / "store"), root / "cache")


def build_old(folder: Path) -> None:
    (folder / "result.json").write_text('{"producer": -1}')


@pytest.mark.parametrize("attempt", range(3))
def test_one_of_fifty_builds_and_all_get_the_same(tmp_path: Path, attempt: int) -> None:
    builders, answers = race(tmp_path)
    assert len(builders) == 1
    assert len(answers) == RACERS
    assert [answer["cached"] for answer in answers].count(False) == 1
    for answer in answers:
        assert answer["producer"] == builders[0]
        assert answer["names"] == ["result.json"]
    assert len({answer["digest"] for answer in answers}) == 1
    assert list((tmp_path / "store" / "v1" / "tmp").iterdir()) == []


def test_fifty_readers_of_a_stored_artifact_build_nothing(tmp_path: Path) -> None:
    store_of(tmp_path).get_or_build(KEY, build_old)
    builders, answers = race(tmp_path)
    assert builders == []
    assert [answer["producer"] for answer in answers] == [-1] * RACERS


@pytest.mark.parametrize("attempt", range(3))
def test_fifty_readers_of_a_spoiled_artifact_mend_it_once(tmp_path: Path, attempt: int) -> None:
    artifact, _ = store_of(tmp_path).get_or_build(KEY, build_old)
    blob = tmp_path / "store" / blob_name(artifact.manifest.files["result.json"].sha256)
    blob.chmod(0o644)
    blob.write_text('{"producer": -2}')
    builders, answers = race(tmp_path)
    assert len(builders) == 1
    assert [answer["producer"] for answer in answers] == builders * RACERS
    quarantined = [path for path in (tmp_path / "store" / "v1" / "quarantine").rglob("*") if path.is_file()]
    # The spoiled blob and the manifest that asked for it; not what was built in their place.
    assert len(quarantined) == 2
