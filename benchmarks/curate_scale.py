"""How memory and time of curation grow with the rows: a generated set, curated in a process of its own.

No peer: the bound is the rows' own size as Arrow holds them. The growth is that of the peak resident memory over what
the same process held after it had curated a small set, so that libraries and models are not counted. Batches of full
size, which the small set does not fill, are in it; what more rows cost beyond them is the growth from one size to the
next.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = (25_000, 100_000)
WARM_ROWS = 2_000
WORDS = 20_000
_SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]

_PROGRAM = """
import json, sys, time
from pathlib import Path
from qlora_core.config.data import DataConfig
from qlora_core.data.curate import curate

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

folder, rows = Path(sys.argv[1]), Path(sys.argv[2])
settings = json.loads(sys.argv[3])
config = DataConfig(sources=["-"], **settings)
curate(config, [folder / "warm.jsonl"], folder / "tokenizer", 512, folder / "warm")
before, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
curation = curate(config, [rows], folder / "tokenizer", 512, folder / "out")
print(json.dumps({
    "rows": curation["rows"], "reasons": curation["reasons"], "peak_growth_bytes": peak_bytes() - before,
    "peak_bytes": peak_bytes(), "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
}))
"""


def measure(rows: tuple[int, ...] = ROWS) -> dict[str, Any]:
    """For each size: rows, their Arrow size, growth of the peak and its ratio to that size, seconds. From the first
    size to the last: by how much the peak grows with the Arrow size.

    A million rows take about half an hour. Language is not tagged: lingua alone takes some milliseconds a row, and no
    memory a row.
    """
    settings = {"tags": {"language": False}}
    figures: dict[str, Any] = {"settings": settings, "sizes": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "warm.jsonl", WARM_ROWS, seed=1)
        _write_tokenizer(folder / "tokenizer", folder / "warm.jsonl")
        for count in rows:
            source = folder / "rows.jsonl"
            _write(source, count, seed=2)
            command = [sys.executable, "-c", _PROGRAM, str(folder), str(source), json.dumps(settings)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            arrow_bytes = _arrow_bytes(source)
            ratio = round(found["peak_growth_bytes"] / arrow_bytes, 3)
            figures["sizes"].append({**found, "arrow_bytes": arrow_bytes, "growth_over_arrow": ratio})
    first, last = figures["sizes"][0], figures["sizes"][-1]
    if last["arrow_bytes"] > first["arrow_bytes"]:
        grown = last["peak_growth_bytes"] - first["peak_growth_bytes"]
        figures["growth_per_arrow_byte"] = round(grown / (last["arrow_bytes"] - first["arrow_bytes"]), 3)
    return figures


def _write(path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(WORDS)]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            prompt = " ".join(rng.choices(vocabulary, k=rng.randint(8, 40)))
            answer = " ".join(rng.choices(vocabulary, k=rng.randint(8, 60)))
            row = {"instruction": f"Task {number}: {prompt}?", "output": f"{answer}.", "category": f"kind {number % 7}"}
            stream.write(json.dumps(row) + "\n")


def _write_tokenizer(folder: Path, rows: Path) -> None:
    from qlora_core.demo.tokenizer import train_tokenizer

    texts = [" ".join(json.loads(line).values()) for line in rows.read_text().splitlines()]
    train_tokenizer(texts, vocab_size=2_000, max_tokens=512).save_pretrained(str(folder))


def _arrow_bytes(path: Path) -> int:
    from qlora_core.config.curation import ReadersConfig
    from qlora_core.data.reading import read_source
    from qlora_core.data.source_files import SourceFile

    return read_source(SourceFile(path.name, path), ReadersConfig()).rows.nbytes
