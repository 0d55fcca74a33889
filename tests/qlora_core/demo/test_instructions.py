import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.curation import NearDuplicatesConfig, ReadersConfig, SplitConfig
from qlora_core.demo.instructions import PLANTED, write_instructions
from qlora_core.demo.tasks import FAMILIES, make_tasks
from qlora_core.demo.words import COLOURS, KINDS, OPPOSITES, THINGS
from qlora_core.digest import digest_file

ROLES = {"user", "human", "assistant", "gpt"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_instructions(tmp_path_factory.mktemp("demo") / "data")


def raw_rows(path: Path) -> list[Any]:
    """Every row of a file; an unparsable line is the text itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    rows: list[Any] = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            rows.append(line)
    return rows


def pair(row: Any, *, conversations: bool = False) -> tuple[str, str] | None:
    """Question and answer of a sound row, None for a broken one: an independent reading of the three formats.

    Of a conversation they are the last ones, if they are asked for.
    """
    try:
        if "instruction" in row or "output" in row:
            question = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
            parts = [question, row["output"]] if isinstance(row["instruction"], str) else [17, ""]
        else:
            turns = row.get("messages") or row.get("conversations")
            if {turn.get("role") or turn.get("from") for turn in turns} - ROLES:
                return None
            parts = [turn.get("content") or turn.get("value") for turn in turns]
            if len(parts) == 4:
                return None if not conversations else (parts[2], parts[3])
    except (AttributeError, KeyError, TypeError):
        return None
    question, answer = parts
    texts = isinstance(question, str) and isinstance(answer, str)
    return (question, answer) if texts and question.strip() and answer.strip() else None


def test_same_seed_gives_same_bytes_and_another_seed_others(files: list[Path], tmp_path: Path) -> None:
    again = write_instructions(tmp_path / "again")
    other = write_instructions(tmp_path / "other", seed=1)
    assert [digest_file(path) for path in again] == [digest_file(path) for path in files]
    assert all(digest_file(a) != digest_file(b) for a, b in zip(files, other, strict=True))


def test_planted_counts_are_what_the_files_hold(files: list[Path]) -> None:
    rows = [(path.name, pair(row)) for path in files for row in raw_rows(path)]
    assert len(rows) == PLANTED.rows
    assert sum(found is None for _, found in rows) == PLANTED.broken + PLANTED.follow_ups
    sound = [(name, found) for name, found in rows if found]
    long = [found for _, found in sound if len(found[0].split()) > 150]
    assert len(long) == PLANTED.over_long
    within = sum(count - 1 for count in Counter(sound).values())
    assert within == PLANTED.duplicates_within_file
    different = Counter(found for _, found in sound)
    assert sum(different.values()) - len(different) == within + PLANTED.duplicates_across_files
    folded = Counter(tuple("".join(filter(str.isalnum, part.lower())) for part in found) for found in different)
    assert len(different) - len(folded) == PLANTED.near_copies
    assert len(folded) - len(long) == PLANTED.clean


def test_follow_ups_ask_what_another_row_asks(files: list[Path]) -> None:
    rows = [row for path in files for row in raw_rows(path)]
    later = [pair(row, conversations=True) for row in rows if pair(row) is None and pair(row, conversations=True)]
    assert len(later) == PLANTED.follow_ups
    asked = {" ".join(found[0].lower().split()) for row in rows if (found := pair(row))}
    assert all(" ".join(found[0].lower().split()) in asked for found in later if found)


def test_there_is_enough_in_enough_families(files: list[Path]) -> None:
    rows = [row for path in files for row in raw_rows(path) if isinstance(row, dict) and pair(row)]
    counts = Counter(row["category"] for row in rows)
    assert len(rows) >= 2000
    assert set(counts) == set(FAMILIES)
    assert min(counts.values()) >= 150


def test_readme_states_the_counts(files: list[Path]) -> None:
    text = (files[0].parent / "README.md").read_text(encoding="utf-8")
    assert all(f"| {count} |" in text for count in PLANTED)


def test_curation_finds_exactly_what_was_planted(files: list[Path]) -> None:
    from qlora_core.data.deduplicate import drop_duplicates
    from qlora_core.data.near_duplicates.find import drop_near_duplicates
    from qlora_core.data.placement import place_rows
    from qlora_core.data.reading import read_sources
    from qlora_core.data.row_store import RowStore
    from qlora_core.data.source_files import list_source_files

    readings = read_sources(list_source_files([files[0].parent]), ReadersConfig())
    assert [reading.format for reading in readings] == ["alpaca", "messages", "sharegpt"]
    assert sum(reading.rows_in for reading in readings) == PLANTED.rows
    assert sum(len(reading.quarantined) for reading in readings) == PLANTED.broken
    order = {reading.name: place for place, reading in enumerate(readings)}
    rows = RowStore.concatenate(reading.rows for reading in readings)
    kept, dropped = drop_duplicates(rows, order)
    assert len(dropped) == PLANTED.duplicates_within_file + PLANTED.duplicates_across_files
    unique = rows.select(kept)
    near = drop_near_duplicates(unique, order, NearDuplicatesConfig())
    # A few generated rows are like each other beyond what was planted: "after 12, 13, 14" and "after 12, 13, 14, 15".
    assert PLANTED.near_copies <= len(near.dropped) <= PLANTED.near_copies + 25
    placement = place_rows(unique.select(near.kept), SplitConfig(), near.cluster_of[near.kept])
    # About a third of the pairs are parted by shares of .8, .1 and .1.
    assert 3 <= len(placement.dropped) <= PLANTED.follow_ups


def test_answers_are_right() -> None:
    things = {thing.name: thing for thing in THINGS}
    for task in make_tasks(60, random.Random(3)):
        words = task.prompt.replace("?", " ").replace(".", " ").replace(",", " ").replace(":", " ").split()
        numbers = [int(word) for word in words if word.isdigit()]
        named = [things[word] for word in words if word in things]
        if task.category == "opposite":
            assert task.answer in {OPPOSITES[word] for word in words if word in OPPOSITES}
        elif task.category == "colour":
            assert task.answer == named[0].colour
        elif task.category == "kind":
            assert task.answer == named[0].kind
        elif task.category == "plural":
            assert task.answer == named[0].plural
        elif task.category == "comparison":
            assert task.answer == str(max(numbers) if "larger" in words else min(numbers))
        elif task.category == "counting":
            assert task.answer == str(numbers[-1] + 1)
        elif task.category == "membership":
            assert task.answer == ("yes" if named[0].kind in words else "no")
        elif task.category == "capitals":
            assert task.answer.lower() in words
        elif task.category == "before":
            assert task.answer == str(numbers[0] - 1)
        else:
            assert (task.category, task.answer.count(" ")) == ("sentence", 3)


def test_tasks_do_not_repeat_a_prompt_and_stop_at_the_count() -> None:
    tasks = make_tasks(40, random.Random(0))
    assert len({task.prompt for task in tasks}) == len(tasks) == 40 * len(FAMILIES)
    assert make_tasks(0, random.Random(0)) == []


def test_the_words_are_told_apart() -> None:
    assert len({thing.name for thing in THINGS}) == len({thing.plural for thing in THINGS}) == len(THINGS)
    assert {thing.colour for thing in THINGS} == set(COLOURS)
    assert {thing.kind for thing in THINGS} == set(KINDS)
    assert all(OPPOSITES[OPPOSITES[word]] == word for word in OPPOSITES)
