"""`python crowd_pool.py ROOT PROCESSES ROUNDS`: processes that fill, read and evict one small pool at the same time.

Ends with an error where one of them is given anything but what it asked for.
"""

import random
import sys
from pathlib import Path

from forks import at_once, fork, status_of

from qlora_core.digest import digest_bytes
from qlora_core.store.manifest import FileEntry, files_digest
from qlora_core.store.pool import BlobPool

BLOB_BYTES = 1000
CONTENTS = [bytes([number]) * BLOB_BYTES for number in range(12)]


def main(root: Path, processes: int, rounds: int) -> None:
    """Let them go together."""

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(rounds):
            wanted = {f"{path}.json": content for path, content in zip("abc", chance.sample(CONTENTS, 3), strict=True)}
            # A process of its own: what it was given is free to go at its end.
            if status_of(fork(lambda wanted=wanted: use(root, root / f"incoming-{number}", wanted))):
                raise ChildProcessError(f"process {number} failed")

    if any(at_once(processes, work)):
        sys.exit(1)


def use(root: Path, incoming: Path, wanted: dict[str, bytes]) -> None:
    """As a reader of a bucket does it: bring what is missing, be given the folder, make room."""
    pool = BlobPool(root / "pool", 5 * BLOB_BYTES)
    files = {path: FileEntry(sha256=digest_bytes(data), size_bytes=len(data)) for path, data in wanted.items()}
    for _ in range(100):
        for path, entry in files.items():
            if pool.fault(entry):
                incoming.write_bytes(wanted[path])
                pool.adopt(incoming, entry.sha256)
        folder = pool.view(files_digest(files), files)
        pool.make_room()
        if folder is not None:
            break
    else:
        raise TimeoutError("what was brought was evicted a hundred times")
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    if found != wanted:
        raise ValueError(f"{folder} has {sorted(found)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
