"""`python race.py ROOT COUNT`: as many producers of one key, let go together.

Each build appends its number to ROOT/builds, each answer is a line of JSON in ROOT/answers.
"""

import json
import os
import sys
from pathlib import Path

from forks import at_once

from qlora_core.store.artifact import StageKey
from qlora_core.store.store import open_store


def main(root: Path, count: int) -> None:
    """Let them go together."""

    def produce(number: int) -> None:
        def build(folder: Path) -> None:
            _append(root / "builds", str(number))
            (folder / "result.json").write_text(json.dumps({"producer": number}))

        store = open_store(str(root / "store"), root / "cache")
        artifact, cached = store.get_or_build(StageKey("sweep", "1", {}, {}), build)
        content = json.loads((artifact.path / "result.json").read_text())
        names = sorted(path.name for path in artifact.path.rglob("*"))
        _append(root / "answers", json.dumps({"cached": cached, "digest": artifact.digest, "names": names, **content}))

    if any(at_once(count, produce)):
        sys.exit(1)


def _append(file: Path, line: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
