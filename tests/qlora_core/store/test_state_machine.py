"""The store beside a plain dict that does the same: whatever is done and damaged in whatever order, they agree."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qlora_core.digest import digest_bytes
from qlora_core.store.artifact import StageKey
from qlora_core.store.layout import BLOBS, STAGES, blob_name, manifest_name
from qlora_core.store.store import Store, open_store

Files = dict[str, bytes]
KEYS = [StageKey("sweep", "1", {"number": number}, {}) for number in range(3)]
# They share files, in part under other names.
CONTENTS: list[Files] = [
    {"a.json": b"{}", "b.json": b"[]"},
    {"a.json": b"[]", "sub/c.json": b"[1]"},
    {"a.json": b"{}", "sub/c.json": b"{}"},
    {"weights.safetensors": b"w" * 5000},
]
numbers = st.sampled_from(range(len(KEYS)))
files = st.sampled_from(CONTENTS)
BLOB_BYTES = {digest_bytes(data): data for content in CONTENTS for data in content.values()}
blobs = st.sampled_from(sorted(BLOB_BYTES))


def builder(content: Files) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for path, data in content.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(data)

    return build


def read(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class StoreAndDict(RuleBasedStateMachine):
    """`stored` is what should be there; `broken` are blobs that were hurt or moved away and not written since."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="store-machine-"))
        self.store = self.opened()
        self.stored: dict[int, Files] = {}
        self.broken: set[str] = set()

    def opened(self) -> Store:
        return open_store(str(self.root / "store"), self.root / "cache")

    def is_whole(self, number: int) -> bool:
        return not self.broken & {digest_bytes(data) for data in self.stored[number].values()}

    def expected(self, number: int) -> Files | None:
        """What a verified read gives, which also forgets what it finds spoiled."""
        if number in self.stored and not self.is_whole(number):
            del self.stored[number]
        return self.stored.get(number)

    @rule(number=numbers, content=files)
    def get_or_build(self, number: int, content: Files) -> None:
        there = self.expected(number)
        artifact, cached = self.store.get_or_build(KEYS[number], builder(content))
        assert cached == (there is not None)
        if there is None:
            self.stored[number] = there = content
            self.broken -= {digest_bytes(data) for data in content.values()}
        assert read(artifact.path) == there

    @rule(number=numbers)
    def fail_to_build(self, number: int) -> None:
        def broken_off(folder: Path) -> None:
            (folder / "half.json").write_text("{}")
            raise ValueError("broken off")

        there = self.expected(number)
        if there is None:
            with pytest.raises(ValueError, match="broken off"):
                self.store.get_or_build(KEYS[number], broken_off)
        else:
            assert read(self.store.get_or_build(KEYS[number], broken_off)[0].path) == there

    @rule(number=numbers)
    def get(self, number: int) -> None:
        there = self.expected(number)
        artifact = self.store.get(KEYS[number])
        assert (read(artifact.path) if artifact else None) == there

    @rule(number=numbers)
    def find(self, number: int) -> None:
        manifest = self.store.find(KEYS[number])
        found = {path: BLOB_BYTES[entry.sha256] for path, entry in manifest.files.items()} if manifest else None
        assert found == self.stored.get(number)

    @rule(number=numbers)
    def remove_manifest(self, number: int) -> None:
        assert self.store.backend.remove(manifest_name(KEYS[number].address)) == (number in self.stored)
        self.stored.pop(number, None)

    @rule(sha256=blobs, keeps_its_size=st.booleans())
    def spoil_blob(self, sha256: str, keeps_its_size: bool) -> None:
        blob = self.root / "store" / blob_name(sha256)
        if blob.exists():
            blob.chmod(0o644)
            blob.write_bytes(b"?" * len(BLOB_BYTES[sha256]) if keeps_its_size else b"?" * 9)
            self.broken.add(sha256)

    @rule(sha256=blobs)
    def remove_blob(self, sha256: str) -> None:
        if self.store.backend.remove(blob_name(sha256)):
            self.broken.add(sha256)

    @precondition(lambda self: (self.root / "store" / "v1" / "view").is_dir())
    @rule()
    def litter_the_folders_of_links(self) -> None:
        for folder in (self.root / "store" / "v1" / "view").iterdir():
            if folder.is_dir():
                (folder / "a.json").unlink(missing_ok=True)
                (folder / "a.json").write_bytes(b"not from the store")
                (folder / "stray.json").write_bytes(b"{}")

    @rule()
    def reopen(self) -> None:
        self.store = self.opened()

    @invariant()
    def listings_agree(self) -> None:
        listed = {entry.name for entry in self.store.backend.list(f"{STAGES}/")}
        assert listed == {manifest_name(KEYS[number].address) for number in self.stored}
        kept = {entry.name.rpartition("/")[2] for entry in self.store.backend.list(f"{BLOBS}/")}
        wanted = {digest_bytes(data) for content in self.stored.values() for data in content.values()}
        assert wanted - self.broken <= kept
        for sha256 in kept - self.broken:
            assert (self.root / "store" / blob_name(sha256)).read_bytes() == BLOB_BYTES[sha256]

    def teardown(self) -> None:
        shutil.rmtree(self.root)


StoreAndDict.TestCase.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, derandomize=True, database=None
)
test_store_agrees_with_a_dict = StoreAndDict.TestCase
