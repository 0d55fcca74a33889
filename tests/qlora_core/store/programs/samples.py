"""Artifacts of known content, and what a store says about them afterwards."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.lease import lease_name, parse_lease
from qlora_core.store.store import Store, open_store

SHARED = b'{"vocabulary": "shared by all"}\n'


def key_of(number: int) -> StageKey:
    """The key of a sample."""
    return StageKey("sweep", "1", {"number": number}, {"base": "b" * 64})


def files_of(number: int, size_bytes: int = 2000) -> dict[str, bytes]:
    """What the sample consists of; one of its files is in every other sample too."""
    return {
        "weights.safetensors": random.Random(number).randbytes(size_bytes),
        "config.json": f'{{"number": {number}}}\n'.encode(),
        "tokenizer/tokenizer.json": SHARED,
    }


def builder_of(files: dict[str, bytes]) -> Callable[[Path], None]:
    """A stage that writes them."""

    def build(folder: Path) -> None:
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)

    return build


def fault_of(artifact: Artifact | None, files: dict[str, bytes]) -> str | None:
    """How what was read differs from what was written; None if it does not, or if there is nothing."""
    if artifact is None:
        return None
    found = {path.relative_to(artifact.path).as_posix() for path in artifact.path.rglob("*") if path.is_file()}
    if found != set(files):
        return f"it has the files {sorted(found)}"
    wrong = [path for path in files if (artifact.path / path).read_bytes() != files[path]]
    if wrong:
        return f"{', '.join(wrong)} is not what was written"
    if artifact.manifest.files["config.json"].sha256 != hashlib.sha256(files["config.json"]).hexdigest():
        return "the manifest names another config.json"
    return None


def opened(root: Path) -> Store:
    """The store of a round, as a process opens it that has just begun."""
    return open_store(str(root / "store"), root / "cache")


def lease_state(root: Path, key: StageKey) -> str:
    """How far its producer had come."""
    name = f"stage/{key.stage}/{key.key}"
    file = root / "store" / lease_name(name)
    if not file.exists():
        return "none"
    record = opened(root).backend.read(lease_name(name))
    return parse_lease(record, name).state if record else "none"


def left_over(root: Path, folder: str) -> list[str]:
    """The files and folders under a folder of the store."""
    return sorted(path.name for path in (root / "store" / "v1" / folder).rglob("*"))
