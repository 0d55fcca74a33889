"""`python producer.py ROOT TTL_S RESULT [commit]`: a producer that waits in its build until ROOT/go is there.

Says so in ROOT/building, and prints what it was given as JSON. With `commit` it is killed when its publication has been
decided and its manifest has not been written.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from forks import kill

from qlora_core.store.artifact import StageKey
from qlora_core.store.store import open_store


def kill_before_manifest(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook."""
    if event == "os.link" and str(arguments[1]).endswith("manifest.json"):
        kill(os.getpid())


def main(root: Path, ttl_s: float, result: str, kill_at: str = "") -> None:
    """Build or read the artifact of stage `sweep`."""

    def build(folder: Path) -> None:
        (folder / "half.json").write_text("{}")
        (root / "building").touch()
        while not (root / "go").exists():
            time.sleep(0.01)
        (folder / "result.json").write_text(result)

    if kill_at == "commit":
        sys.addaudithook(kill_before_manifest)
    store = open_store(str(root / "store"), root / "cache", lease_ttl_s=ttl_s)
    artifact, cached = store.get_or_build(StageKey("sweep", "1", {}, {}), build)
    json.dump({"cached": cached, "result": (artifact.path / "result.json").read_text()}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:])
