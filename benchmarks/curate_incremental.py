"""The whole curation stage with 5 % new rows against the whole stage anew, digests compared first.

Twice: with the taggers that are on by default, and with the base model's scores (perplexity and instruction-following
difficulty) on a real small model, which is what a tag cache is for. Each round starts from an empty and from a filled
cache on disk; both ways run in one process, everything compiled and loaded before. Needs the real data beside the
checkout.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tag_cache import DATA, NEW_SHARE, edited_rows
from benchmarks.timing import timed
from qlora_core.config.data import DataConfig
from qlora_core.data.curate import curate
from qlora_core.data.row import Row
from qlora_core.data.tags.cache import FolderShelf, TagCache

BASE = DATA.parent / "models" / "stories260K-hf"
WAYS = {"default taggers": (6_000, {}), "with model scores": (400, {"tags": {"model_scores": True}})}
ROUNDS = 1
WINDOW = 512


def measure() -> dict[str, Any]:
    """Seconds of CPU and wall time of each way, the best of some rounds, and their ratios."""
    return {name: _compare(rows, settings) for name, (rows, settings) in WAYS.items()}


def _compare(count: int, settings: dict[str, Any]) -> dict[str, Any]:
    rows = edited_rows(count)
    best: dict[str, tuple[float, float]] = {}
    config = DataConfig(sources=["-"], **settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old = int(count * (1 - NEW_SHARE))
        _write(folder / "old.jsonl", rows.select(range(old)))
        _write(folder / "all.jsonl", rows)

        def run(source: str, cache: Path) -> Any:
            return curate(
                config, [folder / source], BASE, WINDOW, folder / "out", tag_cache=TagCache(FolderShelf(cache))
            )

        run("old.jsonl", folder / "half")
        for number in range(ROUNDS):
            shutil.copytree(folder / "half", folder / f"half{number}")
            digests = set()
            for way, cache in (("full", f"empty{number}"), ("incremental", f"half{number}")):
                made: list[Any] = []
                cpu_s, wall_s = timed(lambda cache=cache, made=made: made.append(run("all.jsonl", folder / cache)))
                digests.add(made[0]["digest"])
                least = best.get(way, (cpu_s, wall_s))
                best[way] = (min(least[0], cpu_s), min(least[1], wall_s))
            if len(digests) > 1:
                raise AssertionError(f"the two ways give different data: {digests}")
    figures: dict[str, Any] = {"rows": count, "new_rows": count - old, "rounds": ROUNDS}
    figures |= {way: {"cpu_s": round(cpu, 2), "wall_s": round(wall, 2)} for way, (cpu, wall) in best.items()}
    figures["ratio_cpu"] = round(best["full"][0] / best["incremental"][0], 1)
    figures["ratio_wall"] = round(best["full"][1] / best["incremental"][1], 1)
    return figures


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            messages = [{"role": message.role, "content": message.content} for message in row.messages]
            stream.write(json.dumps({"messages": messages}) + "\n")
