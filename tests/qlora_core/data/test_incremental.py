"""A run with kept work against a run from nothing: the same files to the byte, whatever was kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.data import DataConfig
from qlora_core.data.curate import curate
from qlora_core.data.tags.cache import FolderShelf, TagCache

WORDS = [
    "river",
    "stone",
    "garden",
    "engine",
    "market",
    "winter",
    "letter",
    "island",
    "music",
    "doctor",
    "silver",
    "moon",
]
SETTINGS: dict[str, Any] = {
    "plain": {},
    "cut": {"over_long": "cut", "max_tokens": 96},
    "redacted": {"policy": {"personal_data": "redact"}, "packing": {"enabled": True}},
    "loose": {"near_duplicates": {"threshold": 0.5, "shingle_words": 2}},
}


def record(number: int) -> dict[str, Any]:
    words = [WORDS[(number * step + step) % len(WORDS)] for step in range(3, 12)]
    turns = [
        {"role": "user", "content": f"Tell me number {number} about the {' '.join(words[:4])}, please."},
        {"role": "assistant", "content": f"It is {' '.join(words)} and number {number}: é {number % 7}."},
    ]
    if number % 9 == 0:
        turns += [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": f"Then {number}. " * 6}]
    if number % 5 == 0:
        turns.insert(0, {"role": "system", "content": f"You answer in the manner of clerk {number % 3}."})
    if number % 11 == 0:
        turns[-1]["content"] += f" Write to clerk{number}@gmail.com with the key AKIAQ3EGRT5WZ7KD2MLP."
    fields = {"category": f"kind {number % 4}", "licence": "MIT" if number % 2 else None}
    if number % 13 == 0:
        fields["tools"] = [{"name": f"tool {number % 2}"}]
    if number % 17 == 0:
        fields["group_keys"] = [f"story {number % 3}"]
    return {"messages": turns, **fields}


def pair(number: int) -> dict[str, Any]:
    prompt = f"Which of the two is right, {number}, {WORDS[number % len(WORDS)]}?"
    return {"prompt": prompt, "chosen": f"The first, {number}.", "rejected": f"The second, {number}."}


def write(folder: Path, rows: int) -> Path:
    """`rows` conversations, some of them twice or nearly so, and pairs; more rows stand anywhere between the others."""
    folder.mkdir(parents=True)
    numbers = sorted(range(rows), key=lambda number: (number * 37) % 101)
    lines = [record(number) for number in numbers] + [record(3), record(8)]
    nearly = record(21)
    nearly["messages"][-1]["content"] += " Yes."
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, nearly]))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair(number)) + "\n" for number in range(rows // 4)))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(tmp_path: Path, source: Path, tokenizer: Path, name: str, kept: Path | None = None) -> dict[str, bytes]:
    """The files of a curated set; `name` is that of the settings."""
    config = DataConfig(sources=["-"], **{"tags": {"language": False}, **SETTINGS[name]})
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    cache = None if kept is None else TagCache(FolderShelf(kept))
    curate(config, [source], tokenizer, 512, out, tag_cache=cache)
    return files(out)


@pytest.mark.parametrize("name", SETTINGS)
def test_new_rows_beside_kept_work_give_what_a_run_from_nothing_gives(
    name: str, tmp_path: Path, plain_tokenizer: Path
) -> None:
    old, new = write(tmp_path / "old" / "data", 90), write(tmp_path / "new" / "data", 96)
    run(tmp_path, old, plain_tokenizer, name, tmp_path / "kept")
    with_kept = run(tmp_path, new, plain_tokenizer, name, tmp_path / "kept")
    assert with_kept == run(tmp_path, new, plain_tokenizer, name)
    assert with_kept == run(tmp_path, new, plain_tokenizer, name, tmp_path / "kept")
    assert with_kept != run(tmp_path, old, plain_tokenizer, name, tmp_path / "kept")


def test_other_settings_find_nothing_of_the_ones_before(tmp_path: Path, plain_tokenizer: Path) -> None:
    data = write(tmp_path / "data", 60)
    for name in SETTINGS:
        assert run(tmp_path, data, plain_tokenizer, name, tmp_path / "kept") == run(
            tmp_path, data, plain_tokenizer, name
        )


def test_whatever_kept_piece_is_damaged_the_files_are_the_same_and_it_is_named(
    tmp_path: Path, plain_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write(tmp_path / "data", 60)
    expected = run(tmp_path, data, plain_tokenizer, "plain", tmp_path / "kept")
    pieces = sorted((tmp_path / "kept").rglob("*.parquet"))
    for number, piece in enumerate(pieces):
        content = bytearray(piece.read_bytes())
        content[(number * 131) % len(content)] ^= 1
        piece.write_bytes(bytes(content))
    assert run(tmp_path, data, plain_tokenizer, "plain", tmp_path / "kept") == expected
    assert all(piece.name in caplog.text for piece in pieces)


def test_work_on_old_rows_is_not_done_again(
    tmp_path: Path, plain_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the comparison above: the second run really does not look at the old rows' texts again."""
    from qlora_core.data import deduplicate, encodings
    from qlora_core.data.near_duplicates import scan

    asked: dict[str, int] = {}

    def count(module: Any, name: str, size: Callable[..., int]) -> None:
        work = getattr(module, name)

        def counted(*args: Any) -> Any:
            asked[name] = asked.get(name, 0) + size(*args)
            return work(*args)

        monkeypatch.setattr(module, name, counted)

    count(deduplicate, "_key", lambda row: 1)
    count(encodings, "encode_proven", lambda chat, rows: len(rows))
    count(scan, "sign", lambda shingles, permutations, seed: len(shingles.offsets) - 1)
    data, more = write(tmp_path / "old" / "data", 90), write(tmp_path / "new" / "data", 96)
    run(tmp_path, data, plain_tokenizer, "plain", tmp_path / "kept")
    first = dict(asked)
    asked.clear()
    run(tmp_path, more, plain_tokenizer, "plain", tmp_path / "kept")
    assert min(first.values()) > 50
    assert max(asked.values()) <= 12
