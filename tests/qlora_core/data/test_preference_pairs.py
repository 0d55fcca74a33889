"""Preference pairs in their three shapes, and which of them are set aside."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from qlora_core.config.curation import NearDuplicatesConfig, ReadersConfig, SplitConfig
from qlora_core.config.data import DataConfig
from qlora_core.data.chat_template import load_chat_tokenizer
from qlora_core.data.curate import curate
from qlora_core.data.dataset import PreferenceRow, TokenRow, read_split
from qlora_core.data.deduplicate import drop_duplicates
from qlora_core.data.loss_mask import text_parts
from qlora_core.data.near_duplicates.find import drop_near_duplicates
from qlora_core.data.placement import place_rows
from qlora_core.data.reading import SourceReading, read_source
from qlora_core.data.row import row_id
from qlora_core.data.shards import shard_files
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


def curated(folder: Path, tokenizer: Path, source: Path, **values: object) -> list[TokenRow]:
    settings = DataConfig(sources=["unused"], **values)  # pyright: ignore[reportArgumentType]
    curate(settings, [source], tokenizer, 512, folder)
    return [row for side in ("train", "validation", "test") for row in read_split(folder, side)]


def test_both_answers_come_back_in_tokens_each_with_its_mask(
    tmp_path: Path, chatml_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"No idea of {n}."} for n in range(40)]
    rows = curated(tmp_path / "out", chatml_tokenizer, write_jsonl([*pairs]))
    chat = load_chat_tokenizer(chatml_tokenizer, None)

    assert len(rows) == 40
    for row in rows:
        assert isinstance(row, PreferenceRow)
        [(better_prompt, _), (better, _), *_] = text_parts(chat, row.input_ids, row.loss_mask)
        [(worse_prompt, asked), (worse, trained), *_] = text_parts(chat, row.rejected_ids, row.rejected_mask)
        number = better.removeprefix("It is ").removesuffix(".<|im_end|>")
        assert better_prompt == worse_prompt and f"What is {number}?" in worse_prompt
        assert (worse, asked, trained) == (f"No idea of {number}.<|im_end|>", False, True)


def test_a_pair_whose_worse_answer_cannot_be_trained_stays_as_an_example_and_is_counted(
    tmp_path: Path, chatml_tokenizer: Path, write_jsonl: WriteJsonl, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {0: "word " * 600, 1: "It ends with <|im_end|> so."}
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": odd.get(n, "No.")} for n in range(40)]
    source = write_jsonl([*pairs])

    kept: dict[str, object] = {"max_tokens": 256, "policy": {"injection": "keep"}}

    rows = curated(tmp_path / "drop", chatml_tokenizer, source, **kept)
    assert len(rows) == 40 and sum(isinstance(row, PreferenceRow) for row in rows) == 38
    assert "2 rows are kept as examples, but not as preference pairs: 1 over_long, 1 special_token_text" in caplog.text

    cut = curated(tmp_path / "cut", chatml_tokenizer, source, **kept, over_long="cut")
    longest = max((row for row in cut if isinstance(row, PreferenceRow)), key=lambda row: len(row.rejected_ids))
    assert len(cut) == 40 and len(longest.rejected_ids) == len(longest.rejected_mask) == 256


def test_sets_written_before_pairs_had_tokens_are_read_as_plain_rows(
    tmp_path: Path, chatml_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(40)]
    rows = curated(tmp_path / "out", chatml_tokenizer, write_jsonl([*pairs]))
    for side in ("train", "validation", "test"):
        for path in shard_files(tmp_path / "out", side):
            pq.write_table(pq.read_table(path).drop_columns(["rejected_ids", "rejected_mask"]), path)

    old = [row for side in ("train", "validation", "test") for row in read_split(tmp_path / "out", side)]
    assert old == [TokenRow(row.id, row.input_ids, row.loss_mask) for row in rows]
