"""Each format from small files: what conversation comes out, and what goes to quarantine."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.curation import ReadersConfig
from qlora_core.data.containers.record import LONGEST_REASON, set_aside
from qlora_core.data.reading import SourceReading, check_quarantine, read_source
from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError

WriteJsonl = Callable[..., Path]


def read(path: Path, **settings: Any) -> SourceReading:
    return read_source(SourceFile(path.name, path), ReadersConfig(**settings))


def turns(reading: SourceReading, row: int = 0) -> list[tuple[str, str, bool]]:
    return [(m.role, m.content, m.train) for m in reading.rows[row].messages]


QA = [("user", "2 + 2?", False), ("assistant", "4", True)]

SAME_EXCHANGE = [
    ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4"}),
    ("alpaca", {"instruction": "2 + 2?", "context": "", "response": " 4\n", "category": "qa"}),
    ("messages", {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "2 + 2?"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "text": "4"}], "loss_weight": 1.0},
            ]
        },
    ),
    ("messages", {"conversations": [{"role": "human", "content": "2 + 2?"}, {"role": "gpt", "content": "4"}]}),
    ("sharegpt", {"id": "x", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}),
    ("sharegpt", {"conversations": [{"from": "User", "value": "2 + 2?"}, {"from": "chatgpt", "value": "4"}]}),
    ("prompt/response", {"prompt": "2 + 2?", "response": "4"}),
    ("prompt/response", {"prompt": "2 + 2?", "completion": "4"}),
    ("prompt/response", {"question": "2 + 2?", "answer": "4"}),
    ("prompt/response", {"subject": "sums", "input": "2 + 2?", "output": "4"}),
    (
        "prompt/response",
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]},
    ),
    (
        "prompt/response",
        {
            "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\n2 + 2?\n\n### Response:\n",
            "response": "4",
        },
    ),
    ("self-instruct", {"id": "s", "instruction": "2 + 2?", "instances": [{"input": "", "output": "4"}]}),
    (
        "oasst",
        {
            "message_tree_id": "t",
            "prompt": {"role": "prompter", "text": "2 + 2?", "replies": [{"role": "assistant", "text": "4"}]},
        },
    ),
]


@pytest.mark.parametrize(("form", "record"), SAME_EXCHANGE)
def test_every_format_yields_the_same_conversation(form: str, record: dict, write_jsonl: WriteJsonl) -> None:
    reading = read(write_jsonl([record]))

    assert reading.format == form
    assert turns(reading) == QA
    assert (reading.rows_in, reading.quarantined) == (1, [])


def test_equal_conversations_get_equal_ids_whatever_their_format(write_jsonl: WriteJsonl) -> None:
    ids = {read(write_jsonl([record], f"{n}.jsonl")).rows[0].id for n, (_, record) in enumerate(SAME_EXCHANGE)}

    assert len(ids) == 1


def test_alpaca_input_follows_instruction_and_labels_are_kept(write_jsonl: WriteJsonl) -> None:
    row = {
        "instruction": "Sum up.",
        "input": "A long text.",
        "output": "Short.",
        "category": "summary",
        "license": "MIT",
    }

    reading = read(write_jsonl([row]))

    assert turns(reading)[0] == ("user", "Sum up.\n\nA long text.", False)
    assert (reading.rows[0].category, reading.rows[0].licence) == ("summary", "MIT")


def test_wrapper_with_input_equals_the_unwrapped_row(write_jsonl: WriteJsonl) -> None:
    wrapped = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSum up.\n\n### Input:\nA text.\n\n"
        "### Response:"
    )

    one = read(write_jsonl([{"prompt": wrapped, "response": "S."}], "a.jsonl"))
    other = read(write_jsonl([{"instruction": "Sum up.", "input": "A text.", "output": "S."}], "b.jsonl"))

    assert one.rows[0].id == other.rows[0].id


def test_text_that_only_quotes_the_wrapper_is_left_alone(write_jsonl: WriteJsonl) -> None:
    prompt = "Below is an instruction that describes a task. What does this sentence mean?"

    assert turns(read(write_jsonl([{"prompt": prompt, "response": "R."}])))[0][1] == prompt


def test_weights_choose_the_trained_turns(write_jsonl: WriteJsonl) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]

    reading = read(write_jsonl([{"messages": messages}]))

    assert [train for *_, train in turns(reading)] == [False, False, False, False, True]


def test_self_instruct_instances_are_rows_of_their_own(write_jsonl: WriteJsonl) -> None:
    instances = [{"input": "1", "output": "one"}, {"input": "2", "output": "two"}, {"input": "3", "output": ""}]

    reading = read(write_jsonl([{"instruction": "Spell.", "instances": instances}]))

    assert [turns(reading, i)[1][1] for i in range(2)] == ["one", "two"]
    assert reading.rows_in == 3
    assert [entry.kind for entry in reading.quarantined] == ["empty answer"]


def test_oasst_takes_the_best_ranked_path_and_trims_its_end(write_jsonl: WriteJsonl) -> None:
    tree = {
        "message_tree_id": "t",
        "prompt": {
            "role": "prompter",
            "text": "root",
            "replies": [
                {"role": "assistant", "text": "second", "rank": 1},
                {"role": "assistant", "text": "unranked"},
                {
                    "role": "assistant",
                    "text": "best",
                    "rank": 0,
                    "replies": [{"role": "prompter", "text": "a follow-up nobody answered"}],
                },
                {"role": "assistant", "text": "gone", "rank": -1, "deleted": True},
            ],
        },
    }

    reading = read(write_jsonl([tree]))

    assert turns(reading) == [("user", "root", False), ("assistant", "best", True)]
    assert reading.trimmed == 1
    assert reading.rule is not None


USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def chat(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


BAD_RECORDS = [
    ("not JSON", '{"messages": [{"role": "user", '),
    ("not JSON", "[" * 100_000),
    ("unknown role", chat(USER, {"role": "wizard", "content": "b"})),
    ("empty answer", chat(USER, {"role": "assistant", "content": "  "})),
    ("empty turn", chat({"role": "user", "content": ""}, ANSWER)),
    ("wrong type", chat({"role": "user", "content": 7}, ANSWER)),
    ("wrong type", chat({"role": 5, "content": "a"}, ANSWER)),
    ("wrong type", chat(USER, "b")),
    ("wrong type", '["a", "list"]'),
    ("missing field", chat("a", "b")),
    ("no assistant turn", chat(USER)),
    ("no opening user turn", chat(ANSWER)),
    ("nothing to train", chat(USER, {**ANSWER, "weight": 0})),
    ("wrong weight", chat(USER, {**ANSWER, "weight": 0.5})),
    ("wrong weight", chat({**USER, "loss_weight": 1.0}, ANSWER)),
    ("unusable part", chat({"role": "user", "content": [{"type": "image"}]}, ANSWER)),
    ("tool call", chat(USER, {"role": "assistant", "tool_calls": [{}]})),
    ("misplaced system turn", chat(USER, {"role": "system", "content": "s"}, ANSWER)),
    ("invalid text", '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}'),
]


@pytest.mark.parametrize(("kind", "record"), BAD_RECORDS)
def test_bad_record_is_set_aside_with_its_line_and_the_rest_is_read(
    kind: str, record: object, write_jsonl: WriteJsonl
) -> None:
    good = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

    reading = read(write_jsonl([good, "", record, good]))

    assert len(reading.rows) == 2
    [entry] = reading.quarantined
    assert (entry.file, entry.line, entry.kind) == ("rows.jsonl", 3, kind)
    assert reading.rows_in == 3


def test_invalid_utf8_line_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff", "response": "b"}\n')

    reading = read(path)

    assert (len(reading.rows), reading.quarantined[0].line, reading.quarantined[0].kind) == (1, 2, "not UTF-8")


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_rows_know_their_line(tmp_path: Path, indent: int | None) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": ""}, {"prompt": "e", "response": "f"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent))

    reading = read(path)

    assert [row.line for row in reading.rows] == ([1, 1] if indent is None else [2, 10])
    assert reading.quarantined[0].line == (1 if indent is None else 6)


def test_json_lines_in_a_json_file_gzipped_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(
        gzip.compress(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n{"prompt": "c", "response": "d"}\r\n')
    )

    assert len(read(path).rows) == 2


def test_single_pretty_printed_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}, indent=2))

    assert len(read(path).rows) == 1


BROKEN_FILES = [
    (b"", "empty"),
    (b" \n", "empty"),
    (b'[{"prompt": "a", "response": "b"}, {"prompt"', "cannot be read as JSON"),
    (b'[\n{"prompt": "a", "response": "b"},\n{"prompt": "c", "response": "d"}\n', "cannot be read as JSON"),
    (b"PK\x03\x04 no text at all", "cannot be read as JSON"),
    (b"Type,Shape\na,b\n", "in no known format"),
    (gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 50, mtime=0)[:-12], "damaged gzip"),
]


# Names of their own: test processes that run side by side must collect the same names, and bytes are no name to read.
BROKEN_FILE_NAMES = ["no bytes", "blank", "cut in a row", "cut array", "zip", "csv", "cut gzip"]


@pytest.mark.parametrize(("data", "complaint"), BROKEN_FILES, ids=BROKEN_FILE_NAMES)
def test_unreadable_file_is_refused_by_name(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(data)

    with pytest.raises(DataError, match=f"broken.json.*{complaint}"):
        read(path)


def test_unknown_format_names_file_fields_and_known_formats(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(DataError, match=r"odd\.jsonl.*\['colour', 'shape'\].*alpaca.*sharegpt"):
        read(write_jsonl([{"colour": "red", "shape": "round"}], "odd.jsonl"))


def test_tie_between_formats_names_both(write_jsonl: WriteJsonl) -> None:
    row = {
        "prompt": "a",
        "response": "b",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }

    with pytest.raises(DataError, match=r"rows\.jsonl fits messages and prompt/response equally well"):
        read(write_jsonl([row]))


def test_name_of_a_file_says_nothing_about_its_format(write_jsonl: WriteJsonl) -> None:
    assert read(write_jsonl([{"prompt": "a", "response": "b"}], "sharegpt_alpaca.jsonl")).format == "prompt/response"


def test_quarantine_above_the_share_stops_with_the_first_reasons(write_jsonl: WriteJsonl) -> None:
    reading = read(write_jsonl([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}]))

    check_quarantine([reading], 0.5)
    with pytest.raises(DataError, match=r"1 of 2 rows.*allows 0\.4(.|\n)*rows\.jsonl, line 2: empty answer"):
        check_quarantine([reading], 0.4)


KEY = "AKIA" + "Q3EGRT5WZ7KD2MLP"
MAIL = "jane.carter85@gmail.com"
LETTER = "please do not tell anyone about this"


@pytest.mark.parametrize("value", [KEY, MAIL, LETTER, "x" * 41, f"{KEY}'\"", f"a\n{MAIL}"])
@pytest.mark.parametrize(
    "record_of",
    [
        lambda value: {"messages": [{"role": value, "content": "Hi"}, {"role": "assistant", "content": "4"}]},
        lambda value: {"messages": [{value: 1, "content": "Hi"}, {"role": "assistant", "content": "4"}]},
        lambda value: {"messages": [{"role": "user", "content": [{"type": value, "x": 1}]}]},
        lambda value: {"text_of": 1, value: 2},
    ],
)
def test_a_reason_tells_no_value(record_of: Callable[[str], dict], value: str, write_jsonl: WriteJsonl) -> None:
    good = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    reading = read(write_jsonl([good, record_of(value)]))

    (entry,) = reading.quarantined
    assert not any(secret in entry.reason for secret in (KEY, MAIL, LETTER, "x" * 41))
    assert entry.kind in ("unknown role", "missing field", "unusable part")


def test_a_plain_word_is_told(write_jsonl: WriteJsonl) -> None:
    good = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    bad = {"messages": [{"role": "narrator", "content": "Hi"}, {"role": "assistant", "content": "4"}]}
    (entry,) = read(write_jsonl([good, bad])).quarantined
    assert entry.reason.startswith("unknown role: 'narrator' in turn 1; known: system")


def test_what_no_quotes_enclose_is_replaced_and_then_cut() -> None:
    entry = set_aside("f", 1, f"bad: {'word ' * 75}{MAIL} {KEY} " + "word " * 9999)
    assert "<EMAIL>" in entry.reason
    assert MAIL not in entry.reason
    assert len(entry.reason) == LONGEST_REASON + 1
