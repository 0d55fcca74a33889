"""Preference pairs in their three shapes, and which of them are set aside."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qlora_core.config.curation import NearDuplicatesConfig, ReadersConfig, SplitConfig
from qlora_core.data.deduplicate import drop_duplicates
from qlora_core.data.near_duplicates.find import drop_near_duplicates
from qlora_core.data.placement import place_rows
from qlora_core.data.reading import SourceReading, read_source
from qlora_core.data.row import row_id
from qlora_core.data.source_files import SourceFile

WriteJsonl = Callable[..., Path]


def read(path: Path) -> SourceReading:
    return read_source(SourceFile(path.name, path), ReadersConfig())


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


OPENING = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
TURNS = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]

SAME_PAIR = [
    {"chosen": f"{OPENING} good", "rejected": f"{OPENING} bad\n"},
    {"prompt": OPENING, "chosen": "good", "rejected": "bad"},
    {"prompt": TURNS, "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]},
    {"chosen": [*TURNS, turn("assistant", "good")], "rejected": [*TURNS, turn("assistant", "bad")]},
    {"prompt": "c", "chosen": [*TURNS, turn("assistant", "good")], "rejected": [*TURNS, turn("assistant", "bad")]},
]


@pytest.mark.parametrize("record", SAME_PAIR)
def test_every_shape_yields_the_same_pair(record: dict, write_jsonl: WriteJsonl) -> None:
    reading = read(write_jsonl([record]))

    assert reading.format == "preference"
    [row] = reading.rows
    assert [(m.role, m.content, m.train) for m in row.messages] == [
        ("user", "a", False),
        ("assistant", "b", False),
        ("user", "c", False),
        ("assistant", "good", True),
    ]
    assert row.rejected == "bad"


def test_pairs_of_other_rejected_answers_or_tools_are_rows_of_their_own(write_jsonl: WriteJsonl) -> None:
    pairs = [{**SAME_PAIR[1], "rejected": text} for text in ("bad", "worse")]
    tools = [[{"name": name}] for name in ("search", "read")]
    rows = read(write_jsonl([*pairs, *({**SAME_PAIR[1], "tools": some} for some in tools)])).rows

    kept, dropped = drop_duplicates(rows, {rows[0].source: 0})
    near = drop_near_duplicates(rows, {rows[0].source: 0}, NearDuplicatesConfig())
    placed = place_rows(rows, SplitConfig(), np.full(len(rows), -1))

    assert len({row.id for row in rows}) == len(kept) == len(near.kept) == 4
    assert dropped == placed.dropped == []
    assert sum(len(side) for side in placed.sides.values()) == 4
    # With nothing but messages the id is what it was before rows had more.
    assert row_id(rows[0].messages) == "d5dfa60782b056eceb2e5b9068d5db1b063d7ea53fd1b676ed0ef8c38c05c004"


def test_question_system_and_labels_stay_with_the_pair(write_jsonl: WriteJsonl) -> None:
    record = {"system": "Be kind.", "question": "q", "chosen": "x", "rejected": "y", "license": "MIT"}

    [row] = read(write_jsonl([record])).rows

    assert [(m.role, m.content) for m in row.messages] == [("system", "Be kind."), ("user", "q"), ("assistant", "x")]
    assert (row.rejected, row.licence) == ("y", "MIT")


BAD_PAIRS = [
    ("diverging pair", {"chosen": f"{OPENING} x", "rejected": "\n\nHuman: other\n\nAssistant: y"}),
    ("diverging pair", {"prompt": "z", **SAME_PAIR[3]}),
    ("empty answer", {"chosen": f"{OPENING} x", "rejected": OPENING}),
    ("empty answer", {"chosen": OPENING, "rejected": f"{OPENING} x"}),
    ("no assistant turn", {"chosen": [*TURNS], "rejected": [*TURNS]}),
    ("no assistant turn", {"chosen": [], "rejected": []}),
    ("wrong type", {"chosen": f"{OPENING} x", "rejected": None}),
    ("no opening user turn", {"chosen": "x", "rejected": "y"}),
    ("missing field", {"chosen": f"{OPENING} x"}),
]


@pytest.mark.parametrize(("kind", "record"), BAD_PAIRS)
def test_unusable_pair_is_set_aside(kind: str, record: dict, write_jsonl: WriteJsonl) -> None:
    reading = read(write_jsonl([SAME_PAIR[0], SAME_PAIR[0], record]))

    assert len(reading.rows) == 2
    assert [(entry.line, entry.kind) for entry in reading.quarantined] == [(3, kind)]


def test_speaker_names_inside_of_a_line_are_text(write_jsonl: WriteJsonl) -> None:
    record = {"prompt": "Who said \nHuman: hello?", "chosen": "x\nAssistant: y", "rejected": "z"}

    [row] = read(write_jsonl([record])).rows

    assert [message.content for message in row.messages] == ["Who said \nHuman: hello?", "x\nAssistant: y"]
