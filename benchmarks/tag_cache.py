"""Tagging with 5 % new rows against tagging all of them, by the default taggers, on real rows and edited copies.

Both ways start with an empty or a full cache on disk, in one process, models loaded; the tables they give are compared
first, and with those of a run without a cache. Needs the real data beside the checkout.
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_core.config.curation import ReadersConfig, TagsConfig
from qlora_core.data.reading import read_sources
from qlora_core.data.row import Row, row_id
from qlora_core.data.row_store import RowStore
from qlora_core.data.source_files import list_source_files
from qlora_core.data.tags.cache import FolderShelf, TagCache
from qlora_core.data.tags.configured import configured_taggers
from qlora_core.data.tags.run import tag_rows
from qlora_core.data.tags.table import TagTable
from qlora_core.data.tags.tagger import Tagger

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "sft"
ROWS = 6_000
NEW_SHARE = 0.05
ROUNDS = 2
COSTED_ROWS = 2_000
_FILES = ("dolly_3k.json", "dolly_hhrlhf_small.jsonl", "gsm8k_train.jsonl", "lf_v1_sft_demo.jsonl")


def measure(rows: int = ROWS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of CPU and wall time of each way, the best of some rounds, their ratios, and each tagger's cost."""
    everything = edited_rows(rows)
    old = everything.select(range(int(rows * (1 - NEW_SHARE))))
    taggers = configured_taggers(TagsConfig(), ["<s>", "</s>"])
    expected = tag_rows(everything, taggers, None)
    figures: dict[str, Any] = {"rows": rows, "new_rows": rows - len(old), "rounds": rounds}
    some = everything.select(range(0, rows, max(1, rows // COSTED_ROWS)))
    figures["cpu_us_per_row"] = {tagger.name: _cpu_us_per_row(tagger, some) for tagger in taggers}
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        full, half = Path(name) / "full", Path(name) / "half"
        tag_rows(old, taggers, TagCache(FolderShelf(half)))
        for number in range(rounds):
            shutil.rmtree(full, ignore_errors=True)
            warm = shutil.copytree(half, Path(name) / f"warm{number}")
            for way, folder in (("full", full), ("incremental", warm)):
                made, cpu_s, wall_s = _timed(lambda f=folder: tag_rows(everything, taggers, TagCache(FolderShelf(f))))
                if not made.table.equals(expected.table):
                    raise AssertionError(f"the {way} run gives another table than a run without a cache")
                least = best.get(way, (cpu_s, wall_s))
                best[way] = (min(least[0], cpu_s), min(least[1], wall_s))
    for way, (cpu_s, wall_s) in best.items():
        figures[way] = {"cpu_s": round(cpu_s, 3), "wall_s": round(wall_s, 3)}
    figures["ratio_cpu"] = round(best["full"][0] / best["incremental"][0], 1)
    figures["ratio_wall"] = round(best["full"][1] / best["incremental"][1], 1)
    return figures


def edited_rows(count: int) -> RowStore:
    """Real rows, then copies of them with a word more in the last turn, until there are `count` distinct ones."""
    readings = read_sources(list_source_files([DATA / name for name in _FILES]), ReadersConfig())
    real = [row for reading in readings for row in reading.rows]
    store = RowStore()
    for number in range(count):
        copy, place = divmod(number, len(real))
        store.append(_edited(real[place], copy) if copy else real[place])
    return store


def _edited(row: Row, copy: int) -> Row:
    last = dataclasses.replace(row.messages[-1], content=f"{row.messages[-1].content} Again {copy}.")
    messages: Sequence[Any] = (*row.messages[:-1], last)
    return dataclasses.replace(row, messages=tuple(messages), id=row_id(messages, row.tools, row.rejected))


def _timed(work: Callable[[], TagTable]) -> tuple[TagTable, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    made = work()
    return made, time.process_time() - cpu, time.perf_counter() - wall


def _cpu_us_per_row(tagger: Tagger, rows: Sequence[Row]) -> float:
    return round(_timed(lambda: tag_rows(rows, [tagger], None))[1] / len(rows) * 1e6, 1)


if __name__ == "__main__":
    import json
    import sys

    sys.stdout.write(json.dumps(measure(rounds=int(sys.argv[1]) if sys.argv[1:] else ROUNDS), indent=1) + "\n")
