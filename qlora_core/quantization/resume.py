"""What a quantization has finished so far, on disk, so that it goes on at the next shard after its process was killed.

A work folder holds `plan.json` (source, settings, versions: any change starts anew), the finished files under `files/`,
and one record for each finished shard. A record is written after its shard was verified, and is believed only while
the shard and what it was made from still have the digests it names. Knows nothing of how a shard is made.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from qlora_core.digest import canonical_json
from qlora_core.errors import ConfigError
from qlora_core.store.contents import sync_to_disk
from qlora_core.store.disk import write_synced

_LOCK_FILE = "lock"
_BLOCK_BYTES = 1 << 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its file, that file's digest, the digest of what it was made from, and its layers' errors."""

    file: str
    digest: str
    source_digest: str
    layers: list[dict[str, Any]]


class WorkFolder:
    """One quantization's work folder, held by this process. Made by `open_work`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"

    def finished(self, file: str, source_digest: Callable[[], str]) -> ShardRecord | None:
        """The record of a shard that need not be made again; None where there is none, or where it does not hold.

        `source_digest` is asked only if the shard itself is sound.
        """
        try:
            record = ShardRecord(**json.loads(self._record(file).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        shard = self.files / file
        if record.file != file or not shard.is_file() or _digest_of(shard) != record.digest:
            logger.warning("%s does not match its record and is made again", shard)
            return None
        if record.source_digest != source_digest():
            logger.warning("%s was made from other weights than the source has now, and is made again", shard)
            return None
        return record

    def keep(self, record: ShardRecord) -> None:
        """Write down that a shard, which is on disk and verified, is finished."""
        sync_to_disk(self.files)
        path = self._record(record.file)
        write_synced(path.with_suffix(".part"), canonical_json(asdict(record)))
        path.with_suffix(".part").replace(path)
        sync_to_disk(self.folder)

    def discard(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _record(self, file: str) -> Path:
        return self.folder / f"{file}.json"


@contextmanager
def open_work(folder: Path, plan: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """The work folder at `folder`, with what an earlier run by an equal `plan` left there; else a fresh one.

    Raises:
        ConfigError: another process works in it. OSError where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as is_ours:
        if not is_ours:
            raise ConfigError(
                f"another process is quantizing the same checkpoint to the same place (it works in {folder}); wait for "
                "it, or name another target"
            )
        work = WorkFolder(folder)
        if _read(folder / "plan.json") != plan:
            for path in folder.iterdir():
                if path.name != _LOCK_FILE:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_synced(folder / "plan.json", canonical_json(plan))
        work.files.mkdir(exist_ok=True)
        yield work


def discard_work(folder: Path) -> None:
    """Remove a work folder, unless a process works in it. Nothing there: no effect."""
    if folder.is_dir():
        with _locked(folder) as is_ours:
            if is_ours:
                WorkFolder(folder).discard()


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder for the block; False where another process does. A killed process lets go."""
    descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except BlockingIOError:
            is_ours = False
        yield is_ours
    finally:
        os.close(descriptor)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _digest_of(path: Path) -> str:
    """What `safetensors_file.read_back` returned for these bytes."""
    whole, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            whole.update(block[:count])
    return whole.hexdigest()
