"""Near-duplicate removal beside datasketch's MinHash and LSH, which do the same over the same texts.

Both sides get the same rows, compare the same texts, use the same shingles, permutations, bands and threshold, verify
every candidate exactly and keep a row by the same rule. Each side is timed in turn, end to end and for signatures
alone, and there are no figures unless the kept sets agree. The rows are made from real sets beside the checkout, or
from generated texts where those are absent: prompts and answers put together anew, edited copies planted among them.
"""

import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasketch import MinHash, MinHashLSH

from qlora_core.config.curation import NearDuplicatesConfig
from qlora_core.data.near_duplicates.find import NearDuplicates, drop_near_duplicates
from qlora_core.data.near_duplicates.scan import text_of
from qlora_core.data.near_duplicates.shingles import shingle
from qlora_core.data.near_duplicates.signatures import choose_banding, sign
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.row_store import RowStore
from qlora_core.data.text_form import folded
from qlora_core.data.wrappers import find_preambles

ROWS = 100_000
ROUNDS = 2
SIGNATURE_ROWS = 3_000
SIGNATURE_ROUNDS = 5
MIN_AGREEMENT = 0.99
PLANTED_SHARE = 0.15
MOST_EDITS = 0.04
SOURCE = "rows"
CONFIG = NearDuplicatesConfig()
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "sft"


def measure(rows: int = ROWS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of CPU and wall time of each side in every round, their ratios (ours in the denominator), our memory."""
    pairs, origin = _pairs()
    made = list(_make_rows(pairs, rows))
    drop_near_duplicates(made[:100], {SOURCE: 0}, CONFIG)
    store = RowStore(made)
    memory = _memory(store)
    end_to_end, results = _race({"ours": lambda: _ours(made), "datasketch": lambda: _theirs(made)}, rounds)
    found, theirs = results["ours"], set(results["datasketch"])
    ours = set(found.kept.tolist())
    agreement = len(ours & theirs) / len(ours | theirs)
    if agreement < MIN_AGREEMENT:
        raise SystemExit(f"the two sides keep other rows: Jaccard similarity of the kept sets is {agreement:.4f}")
    return {
        "packages": {name: version(name) for name in ("rensa", "numba", "numpy", "datasketch")},
        "rows": rows,
        "texts": origin,
        "arrow_bytes": store.nbytes,
        "kept": len(ours),
        "kept_by_datasketch": len(theirs),
        "jaccard_of_kept": agreement,
        "candidates": found.candidates,
        "verified": found.verified,
        "peak_growth_over_arrow_size": memory,
        "end_to_end": end_to_end,
        "signatures": _race(_signers(made[:SIGNATURE_ROWS]), SIGNATURE_ROUNDS)[0],
    }


def _race(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every way in turn, `rounds` times: times, medians and their ratios, and what each way gave."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            results[name] = run()
            taken[name].append({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall})
    medians = {
        name: {unit: statistics.median(t[unit] for t in times) for unit in ("cpu_s", "wall_s")}
        for name, times in taken.items()
    }
    over = {
        f"{name}_over_ours": {unit: medians[name][unit] / medians["ours"][unit] for unit in ("cpu_s", "wall_s")}
        for name in ways
        if name != "ours"
    }
    return {"seconds": taken, "medians": medians, **over}, results


def _ours(rows: Sequence[Row]) -> NearDuplicates:
    return drop_near_duplicates(rows, {SOURCE: 0}, CONFIG)


def _theirs(rows: Sequence[Row]) -> list[int]:
    """The same in plain Python over datasketch: rows in order of survival, each beside those that stay."""
    preambles = find_preambles(rows)
    sets, ids = [], []
    for row in rows:
        sets.append(_shingles(text_of(row, preambles)))
        ids.append(row.id)
    banding = choose_banding(CONFIG.threshold, CONFIG.permutations)
    index = MinHashLSH(num_perm=CONFIG.permutations, params=(banding.bands, banding.rows))
    signatures = MinHash.bulk(sets, num_perm=CONFIG.permutations)
    order = sorted(range(len(ids)), key=lambda place: ids[place])
    kept = []
    for place in order:
        near: list[Any] = index.query(signatures[place])
        if not any(_jaccard(sets[place], sets[other]) >= CONFIG.threshold for other in near):
            index.insert(place, signatures[place], check_duplication=False)
            kept.append(place)
    return kept


def _jaccard(first: set[bytes], second: set[bytes]) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def _shingles(text: str) -> set[bytes]:
    words, width = folded(text).split(), CONFIG.shingle_words
    return {" ".join(words[k : k + width]).encode() for k in range(max(1, len(words) - width + 1))}


def _signers(rows: Sequence[Row]) -> dict[str, Callable[[], object]]:
    """Signatures of shingles that are there already: datasketch's loop by text, as its guide has it, and in bulk."""
    preambles = find_preambles(rows)
    texts = [text_of(row, preambles) for row in rows]
    sets, hashed = [_shingles(text) for text in texts], shingle(texts, CONFIG.shingle_words)

    def by_text() -> None:
        for shingles in sets:
            signature = MinHash(num_perm=CONFIG.permutations)
            for one in shingles:
                signature.update(one)

    return {
        "ours": lambda: sign(hashed, CONFIG.permutations, CONFIG.seed),
        "datasketch_bulk": lambda: MinHash.bulk(sets, num_perm=CONFIG.permutations),
        "datasketch_loop": by_text,
    }


def _memory(store: RowStore) -> float | None:
    """How far the resident memory rises above its start, over the rows' Arrow size; None where Linux does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")
    except OSError:
        return None
    before = _kilobytes(status.read_text(), "VmRSS")
    _ours(store)
    return (_kilobytes(status.read_text(), "VmHWM") - before) * 1024 / store.nbytes


def _kilobytes(status: str, field: str) -> int:
    return int(status.split(f"{field}:")[1].split()[0])


def _pairs() -> tuple[list[tuple[str, str]], str]:
    """Prompts with their answers, and where they come from."""
    if not REAL.is_dir():
        return list(_generated_pairs()), "generated"
    pairs = [
        (f"{row['instruction']}\n\n{row['input']}".strip(), row.get("output") or row.get("response") or "")
        for name in ("dolly_3k.json", "gpteacher_toolformer_sim09.json")
        for row in json.loads((REAL / name).read_text())
    ]
    lines = (REAL / "gsm8k_train.jsonl").read_text().splitlines()
    pairs += [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    return [(prompt, answer) for prompt, answer in pairs if prompt.strip() and answer.strip()], "real"


def _generated_pairs() -> Iterator[tuple[str, str]]:
    """Texts of words drawn by Zipf's law: as many, and about as long, as the real ones."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    for _ in range(16_000):
        drawn = draw.choices(words, weights, k=draw.randint(20, 160))
        cut = draw.randint(5, len(drawn) - 5)
        yield " ".join(drawn[:cut]), " ".join(drawn[cut:])


def _make_rows(pairs: list[tuple[str, str]], count: int) -> Iterator[Row]:
    """`count` rows: a prompt with sentences of two answers, or a copy of an earlier row with some words replaced."""
    draw = random.Random(1)
    made: list[tuple[str, str]] = []
    for number in range(count):
        if made and draw.random() < PLANTED_SHARE:
            prompt, answer = draw.choice(made)
            share = draw.random() * MOST_EDITS
            prompt, answer = _edited(draw, prompt, share), _edited(draw, answer, share)
        else:
            prompt = draw.choice(pairs)[0]
            answer = " ".join(sentence for _ in range(2) for sentence in _some(draw, draw.choice(pairs)[1]))
        made.append((prompt, answer))
        yield make_row(Draft([Message("user", prompt), Message("assistant", answer, train=True)]), SOURCE, number + 1)


def _some(draw: random.Random, answer: str) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", answer.strip())
    return draw.sample(sentences, min(len(sentences), draw.randint(2, 6)))


def _edited(draw: random.Random, text: str, share: float) -> str:
    return re.sub(r"\S+", lambda word: f"edit{draw.randrange(10**6)}" if draw.random() < share else word[0], text)
