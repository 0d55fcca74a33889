"""Digests of files, remembered by what the file system says about them, so that large files are read once.

A remembered digest is used while path, size, inode, change time and modification time are what they were; one taken
within moments of a change is not remembered, since a second change could leave the same times. Losing the memory costs
time and nothing else. Knows nothing of what the files are.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from qlora_core.digest import digest_file

_SETTLED_NS = 2_000_000_000
"""The coarsest time stamp of a file system in use (FAT, 2 s)."""


class FileDigests:
    """Digests with a memory in one JSON file. One that cannot be read or written is as good as empty."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known = _read(memory)
        self._changed = False

    def digest(self, path: Path) -> str:
        """SHA-256 of the file's bytes, 64 hex digits. Raises OSError where it cannot be read."""
        name = str(path.resolve())
        before = _marks(path)
        known = self._known.get(name)
        if known is not None and known[0] == before:
            return str(known[1])
        now = time.time_ns()
        found = digest_file(path)
        if _marks(path) == before and now - max(before[2:]) > _SETTLED_NS:
            self._known[name] = [before, found]
            self._changed = True
        return found

    def save(self) -> None:
        """Write what was learnt, whole or not at all; a folder that takes no files is no fault."""
        if not self._changed:
            return
        partial = self._memory.with_name(f"{self._memory.name}.{os.getpid()}.partial")
        with contextlib.suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._known), encoding="utf-8")
            partial.replace(self._memory)
            self._changed = False


def _marks(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _read(memory: Path) -> dict[str, list[object]]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) == 2}
