"""The demo's instruction set: generated tasks in three file formats, with faults planted for curation to find.

How many of what was planted is fixed by `PLANTED` and written into the folder's README. Knows nothing of how curation
finds them. The same seed gives the same bytes.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_core.demo.tasks import FAMILIES, Task, make_tasks, over_long_task


class Planted(NamedTuple):
    """How many rows of each kind are in the demo's files."""

    clean: int
    duplicates_within_file: int
    duplicates_across_files: int
    near_copies: int
    follow_ups: int
    over_long: int
    broken: int

    @property
    def rows(self) -> int:
        """All rows of all files, unreadable ones included."""
        return sum(self)


PER_FAMILY = 280
"""Tasks per family, where a family has that many."""

PLANTED = Planted(
    clean=2682, duplicates_within_file=60, duplicates_across_files=45, near_copies=120, follow_ups=30, over_long=24,
    broken=20,
)  # fmt: skip
"""Clean rows are counted after PER_FAMILY; a test holds the other numbers against the files."""

OVER_LONG_WORDS = 200
"""Words in an over-long prompt: at two tokens a word and more, past the demo model's 256 tokens."""

Row = dict[str, Any]


def write_instructions(folder: Path, *, seed: int = 0) -> list[Path]:
    """Write `alpaca.json`, `messages.jsonl`, `sharegpt.json` and a README into `folder`; returns the three data files.

    `folder` is created; files of these names in it are replaced.
    """
    rng = random.Random(seed)
    shares = _with_faults(make_tasks(PER_FAMILY, rng), rng)
    folder.mkdir(parents=True, exist_ok=True)
    alpaca, messages, sharegpt = (folder / name for name in ("alpaca.json", "messages.jsonl", "sharegpt.json"))
    _write_array(alpaca, [_alpaca(task) for task in shares[0]], _BROKEN_ALPACA, rng)
    later = [_follow_up(number, task) for number, task in enumerate(rng.sample(shares[0], PLANTED.follow_ups), start=1)]
    told = [*(_messages(task) for task in shares[1]), *later]
    rng.shuffle(told)
    _write_lines(messages, told, _BROKEN_MESSAGES, rng)
    _write_array(sharegpt, [_sharegpt(task) for task in shares[2]], _BROKEN_SHAREGPT, rng)
    (folder / "README.md").write_text(_readme(), encoding="utf-8")
    return [alpaca, messages, sharegpt]


def _with_faults(tasks: list[Task], rng: random.Random) -> list[list[Task]]:
    """The tasks dealt to three files, with duplicates, near-copies of prompts, and over-long rows mixed in.

    No task is planted twice, so each planted row is one row too many, whatever order curation reads the files in.
    """
    third = len(tasks) // 3
    files = [tasks[:third], tasks[third : 2 * third], tasks[2 * third :]]
    chosen = [rng.sample(file, 75) for file in files]
    for index, file in enumerate(files):
        within, across, near = chosen[index][:20], chosen[index][20:35], chosen[index][35:75]
        file += within
        files[(index + 1) % 3] += across
        files[(index + 2) % 3] += [_near_copy(task, rng) for task in near]
        file += [over_long_task(OVER_LONG_WORDS + number, rng) for number in range(8)]
    for file in files:
        rng.shuffle(file)
    return files


def _near_copy(task: Task, rng: random.Random) -> Task:
    """The same question and answer; the question differs in case or closing punctuation."""
    text = task.instruction
    changed = rng.choice((text.lower() + "!", text.upper(), text.rstrip("?.") + "..."))
    return task._replace(instruction=changed)


def _alpaca(task: Task) -> Row:
    return {"instruction": task.instruction, "input": task.given, "output": task.answer, "category": task.category}


def _messages(task: Task) -> Row:
    turns = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.answer}]
    return {"messages": turns, "category": task.category}


def _follow_up(number: int, task: Task) -> Row:
    """A conversation that comes to another row's question in its second turn: a leak where the split parts the two."""
    opening = [
        {"role": "user", "content": f"Good day, this is call {number}."},
        {"role": "assistant", "content": "hello"},
    ]
    return {"messages": [*opening, *_messages(task)["messages"]], "category": task.category}


def _sharegpt(task: Task) -> Row:
    turns = [{"from": "human", "value": task.prompt}, {"from": "gpt", "value": task.answer}]
    return {"conversations": turns, "category": task.category}


def _write_array(path: Path, rows: list[Row], broken: Sequence[Any], rng: random.Random) -> None:
    mixed = _mixed([_line(row) for row in rows], [_line(row) for row in broken], rng)
    path.write_text("[\n" + ",\n".join(mixed) + "\n]\n", encoding="utf-8")


def _write_lines(path: Path, rows: list[Row], broken: Sequence[Any], rng: random.Random) -> None:
    texts = [row if isinstance(row, str) else _line(row) for row in broken]
    path.write_text("\n".join(_mixed([_line(row) for row in rows], texts, rng)) + "\n", encoding="utf-8")


def _mixed(rows: list[str], broken: list[str], rng: random.Random) -> list[str]:
    """`rows` in their order with each broken one somewhere after the first ten, which say what format a file has."""
    mixed = list(rows)
    for text in broken:
        mixed.insert(rng.randint(10, len(mixed)), text)
    return mixed


def _line(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False)


_BROKEN_ALPACA: tuple[Any, ...] = (
    {"instruction": "What colour is the fox?", "input": "", "output": "", "category": "colour"},
    {"instruction": "Which kind is the pear?", "input": "", "output": "   ", "category": "kind"},
    {"instruction": "Name the opposite of dark.", "input": "", "category": "opposite"},
    {"input": "fox, hat, red", "output": "fox", "category": "before"},
    {"instruction": 17, "input": "", "output": "18", "category": "counting"},
    {"instruction": "Write saw in capitals.", "input": "", "output": ["SAW"], "category": "capitals"},
)
"""Two empty answers, an answer and a question missing, two values of the wrong type."""

_BROKEN_MESSAGES: tuple[Any, ...] = (
    '{"messages": [{"role": "user", "content": "Opposite of wet?"}, {"role": "assist',
    "What colour is the plum? purple",
    '{"messages": [}',
    {"messages": [{"role": "narrator", "content": "It is dark."}, {"role": "assistant", "content": "bright"}]},
    {"messages": [{"role": "user", "content": "Plural of hat?"}, {"role": "helper", "content": "hats"}]},
    {"messages": [{"role": "user", "content": "Plural of bus?"}, {"role": "assistant", "content": ""}]},
    {"messages": [{"role": "user"}, {"role": "assistant", "content": "yes"}]},
    {"messages": "Plural of axe? axes"},
)
"""Three unparsable lines, two unknown roles, an empty answer, a missing text, a text in place of a list."""

_BROKEN_SHAREGPT: tuple[Any, ...] = (
    {"conversations": [{"from": "human", "value": "Kind of the tram?"}, {"from": "parrot", "value": "vehicle"}]},
    {"conversations": [{"from": "wizard", "value": "Kind of the van?"}, {"from": "gpt", "value": "vehicle"}]},
    {"conversations": [{"from": "human", "value": "Kind of the coat?"}, {"from": "gpt", "value": ""}]},
    {"conversations": [{"from": "human", "value": "Kind of the torch?"}, {"from": "gpt"}]},
    {"conversations": [{"from": "human", "value": "Kind of the seal?"}, {"from": "gpt", "value": 5}]},
    {"conversations": {"from": "human", "value": "Kind of the ant?"}},
)
"""Two unknown roles, an empty answer, a missing text, a number for a text, an object in place of a list."""


def _readme() -> str:
    families = "\n".join(f"- {name}" for name in FAMILIES)
    return f"""# The demo's instruction set

Generated; every sentence was made by the project itself. {PLANTED.rows} rows in three formats: `alpaca.json`
(instruction, input, output), `messages.jsonl` (role, content) and `sharegpt.json` (from, value).

Task families (the `category` field):

{families}

Planted for curation to find:

| what | rows |
|---|---|
| clean rows | {PLANTED.clean} |
| exact duplicates within a file | {PLANTED.duplicates_within_file} |
| exact duplicates across files | {PLANTED.duplicates_across_files} |
| a prompt again in other case or punctuation: a near-duplicate | {PLANTED.near_copies} |
| a prompt again as a later turn: a leak where the split parts the two | {PLANTED.follow_ups} |
| longer than the demo model's 256 tokens | {PLANTED.over_long} |
| broken: unparsable, unknown role, empty answer, missing field, wrong type | {PLANTED.broken} |
"""
