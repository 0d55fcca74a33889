"""One byte changed anywhere in what is stored: it is found out, named and mended, and never handed out."""

import logging
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_core.digest import digest_bytes
from qlora_core.store.artifact import StageKey
from qlora_core.store.layout import QUARANTINE
from qlora_core.store.lease import lease_name

Files = dict[str, bytes]
Damage = Callable[[bytes, random.Random], bytes]
# Buckets differ in how bytes travel, not in how they are compared.
FLIPS = {"folder": 200, "bucket": 25, "strict": 25}


def flip_one(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= chance.randrange(1, 256)
    return bytes(changed)


def retype_one(content: bytes, chance: random.Random) -> bytes:
    """One letter or digit by another: it stays well formed, as what a flip makes of text seldom does."""
    changed = bytearray(content)
    at = chance.choice([at for at, byte in enumerate(content) if chr(byte).isalnum()])
    kind = string.digits if chr(content[at]).isdigit() else "abcdef"
    changed[at] = ord(chance.choice([other for other in kind if other != chr(content[at])]))
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def sample(number: int) -> tuple[StageKey, Files]:
    """An artifact; one file of it is in the others too."""
    files = {
        "weights.safetensors": random.Random(number).randbytes(1 + 5000 * number),
        "config.json": f'{{"number": {number}}}'.encode(),
        "tokenizer/tokenizer.json": b'{"shared": true}',
    }
    return StageKey("quantize", "1", {"number": number}, {}), files


def builder(files: Files) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)

    return build


def contents(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def flips(request: pytest.FixtureRequest) -> int:
    return FLIPS[request.node.callspec.params["place"]]


def damages(flips: int) -> Iterator[tuple[int, Damage]]:
    yield from ((number, flip_one) for number in range(flips))
    yield from ((number, cut) for number in range(flips // 10))


def test_every_flip_and_cut_of_a_blob_is_named_and_mended(
    place: Any, flips: int, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(4711)
    samples = [sample(number) for number in range(4)]
    for key, files in samples:
        place.store.get_or_build(key, builder(files))
    for number, damage in damages(flips):
        key, files = chance.choice(samples)
        path = chance.choice(list(files))
        sha256 = digest_bytes(files[path])
        place.change_blob(sha256, damage(files[path], chance))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert place.reader().get(key) is None, f"{number}: a spoiled {path} was handed out"
        assert path in caplog.text and sha256 in caplog.text
        rebuilt, cached = place.reader().get_or_build(key, builder(files))
        assert not cached
        assert contents(rebuilt.path) == files
    for key, files in samples:
        healed, cached = place.reader().get_or_build(key, builder(files))
        assert cached, "what others shared with the rebuilt ones is not mended"
        assert contents(healed.path) == files


def test_no_flip_of_a_manifest_is_believed(
    place: Any, flips: int, key: StageKey, build: Any, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(815)
    rounds, harmless = 10 + flips // 3, 0
    for number in range(rounds):
        before = place.reader().get_or_build(key, build)[0].manifest
        damage = chance.choice([flip_one, retype_one])
        place.change_manifest(lambda raw, damage=damage: damage(raw, chance))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = place.reader().get(key)
        if found is None:
            assert f"{key.address}/manifest.json" in caplog.text
            continue
        # One kind of white space for another.
        harmless += 1
        assert found.manifest == before, f"{number}: a forged manifest was believed"
        assert contents(found.path) == files
    assert harmless < rounds // 5
    # No blob was blamed for what its manifest said.
    assert not [name for name in place.names() if name.startswith(f"{QUARANTINE}/blob/")]


def test_flip_of_a_lease_stops_nobody(folder_place: Any, key: StageKey, build: Any) -> None:
    chance = random.Random(99)
    file = folder_place.root / lease_name(f"stage/{key.stage}/{key.key}")
    for _ in range(60):
        artifact, cached = folder_place.reader().get_or_build(key, build)
        assert not cached
        file.write_bytes(flip_one(file.read_bytes(), chance))
        folder_place.store.backend.remove(f"{artifact.manifest.address}/manifest.json")


def test_blobs_of_two_artifacts_changed_about_are_both_named(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    (key, files), (other, other_files) = sample(1), sample(2)
    for each, content in ((key, files), (other, other_files)):
        place.store.get_or_build(each, builder(content))
    path = "weights.safetensors"
    place.change_blob(digest_bytes(files[path]), other_files[path])
    place.change_blob(digest_bytes(other_files[path]), files[path])
    with caplog.at_level(logging.WARNING):
        assert place.reader().get(key) is None
        assert place.reader().get(other) is None
    assert caplog.text.count(digest_bytes(files[path])) >= 2
    assert key.key in caplog.text and other.key in caplog.text
