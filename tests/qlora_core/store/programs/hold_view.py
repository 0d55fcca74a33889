"""`python hold_view.py ROOT LIMIT PATH=SHA256:SIZE...`: be given a folder of links, say so, and live until killed."""

import signal
import sys
from pathlib import Path

from qlora_core.store.manifest import FileEntry, files_digest
from qlora_core.store.pool import BlobPool


def main(root: Path, limit_bytes: int, described: list[str]) -> None:
    """Hold it."""
    files = {}
    for entry in described:
        path, _, content = entry.partition("=")
        sha256, _, size_bytes = content.partition(":")
        files[path] = FileEntry(sha256=sha256, size_bytes=int(size_bytes))
    folder = BlobPool(root, limit_bytes).view(files_digest(files), files)
    sys.stdout.write(f"{folder}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
