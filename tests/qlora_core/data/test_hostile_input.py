"""Input that was made to break readers: quarantine or a clear refusal, never a crash, never a row lost in silence."""

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import ReadersConfig
from qlora_core.data.readers.recognise import known_formats
from qlora_core.data.reading import SourceReading, read_source
from qlora_core.data.row import Row, RowError, make_row
from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError

GOOD = {"prompt": "a", "response": "b"}
NAMES = [
    "prompt",
    "response",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "text",
    "replies",
    "rank",
    "instruction",
    "instances",
    "output",
    "input",
    "tools",
    "weight",
    "license",
    "group_keys",
    "category",
    "message_tree_id",
    "parts",
    "type",
    "system",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**400, max_value=10**401)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["user", "assistant", "gpt", "\ud800", "\0", "\n\nHuman: a\n\nAssistant: b", "‮עברית", "e\u0301"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner),
    max_leaves=12,
)


def read(data: bytes, **settings: Any) -> SourceReading:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(data)
        return read_source(SourceFile("rows", path), ReadersConfig(**settings))


def read_or_refuse(data: bytes) -> SourceReading | None:
    """The reading, with its account checked; None if the file was refused in words."""
    try:
        reading = read(data)
    except DataError as error:
        assert "rows" in str(error)
        return None
    assert reading.rows_in == len(reading.rows) + len(reading.quarantined)
    assert all(isinstance(row, Row) for row in reading.rows)
    assert all(entry.kind and entry.line > 0 and entry.reason.encode() for entry in reading.quarantined)
    return reading


@settings(deadline=None, max_examples=150)
@given(
    fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
    rule=st.sampled_from(["best_path", "best_replies"]),
)
def test_any_fields_make_a_row_or_a_row_error(
    fields: dict[str, Any], rule: Literal["best_path", "best_replies"]
) -> None:
    for form in known_formats(ReadersConfig(oasst=rule)):
        form.matches(fields)
        for part in form.parts(fields):
            try:
                make_row(form.read(part), "rows", 1)
            except RowError as error:
                assert error.kind


@settings(deadline=None, max_examples=100)
@given(values=st.lists(VALUES | st.just(GOOD), max_size=5), as_array=st.booleans(), packed=st.booleans())
def test_any_json_is_accounted_for(values: list[Any], as_array: bool, packed: bool) -> None:
    lines = [json.dumps(value) for value in [GOOD, *values]]
    data = (f"[{', '.join(lines)}]" if as_array else "\n".join(lines)).encode()

    reading = read_or_refuse(gzip.compress(data) if packed else data)

    if reading is not None:
        assert reading.rows_in >= len(lines)


@settings(deadline=None, max_examples=200)
@given(
    start=st.sampled_from(
        [b"", b"[", b"{", b"\x1f\x8b", b"PAR1", b"prompt,response\n", b"a\tb\n", b'{"prompt": "a"}\n']
    ),
    noise=st.binary(max_size=60),
    packed=st.booleans(),
)
def test_any_bytes_are_read_or_refused(start: bytes, noise: bytes, packed: bool) -> None:
    read_or_refuse(gzip.compress(start + noise) if packed else start + noise)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"prompt": ["a"] * 9, "response": ["b"] * 9}), f"{folder}/p")
        parquet = Path(folder, "p").read_bytes()
    lines = "\n".join(json.dumps(GOOD) for _ in range(50)).encode()
    whole = bytearray(data.draw(st.sampled_from([parquet, gzip.compress(lines, mtime=0), lines])))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))

    read_or_refuse(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


HOSTILE = [
    ("not UTF-8", b'{"prompt": "\xff", "response": "b"}'),
    ("not JSON", b'{"prompt": "\x00", "response": "b"}'),
    ("invalid text", b'{"prompt": "\\u0000", "response": "b"}'),
    ("not JSON", b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}"),
    ("not JSON", b'{"prompt": ' + b'{"a":' * 1000 + b"1" + b"}" * 1001),
    ("wrong type", b'{"prompt": 5, "response": "b"}'),
    ("wrong type", b'{"prompt": "a", "response": {"b": 1}}'),
    ("not JSON", b'{"prompt": ' + b"9" * 5000 + b"}"),
    ("not JSON", b"\xe2\x80\xa8"),
]


@pytest.mark.parametrize(("kind", "line"), HOSTILE, ids=[f"line {number}" for number in range(len(HOSTILE))])
def test_hostile_line_is_set_aside_in_lines_and_arrays(kind: str, line: bytes) -> None:
    good = json.dumps(GOOD).encode()

    lines = read(b"\n".join([good, line, good]))
    array = read(b"[" + b",\n".join([good, line, good]) + b"]")

    for reading in (lines, array):
        assert [(entry.line, entry.kind) for entry in reading.quarantined] == [(2, kind)]
        assert len(reading.rows) == 2


def test_writing_of_all_directions_and_combining_marks_comes_through_unchanged() -> None:
    texts = ["שלום ‮abc‬", "مرحبا\u200f", "e\u0301 ≠ é", "👩‍👩‍👧", "a\u0300\u0301\u0302" * 50, "\u202e\u2066x\u2069y"]

    reading = read("\n".join(json.dumps({"prompt": text, "response": text}) for text in texts).encode())

    assert [row.messages[1].content for row in reading.rows] == texts
    assert len({row.id for row in reading.rows}) == len(texts)


def test_rows_before_the_end_of_a_cut_gzip_do_not_pass_for_the_whole() -> None:
    lines = "\n".join(json.dumps(GOOD) for _ in range(1000)).encode()

    with pytest.raises(DataError, match=r"rows is a damaged gzip file: after line \d+"):
        read(gzip.compress(lines)[:-9])


PEAK = """
import sys
from pathlib import Path
from qlora_core.config.curation import ReadersConfig
from qlora_core.data.reading import read_source
from qlora_core.data.source_files import SourceFile

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, large = (SourceFile("rows", Path(path)) for path in sys.argv[2:])
read_source(small, ReadersConfig(max_row_mb=float(sys.argv[1]))).rows.nbytes
before = peak()
reading = read_source(large, ReadersConfig(max_row_mb=float(sys.argv[1])))
stored = reading.rows.nbytes
print(peak() - before, stored, len(reading.rows), [entry.reason for entry in reading.quarantined])
"""


def peak_growth(max_row_mb: float, small: Path, large: Path) -> list[str]:
    command = [sys.executable, "-c", PEAK, str(max_row_mb), str(small), str(large)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(maxsplit=3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("shape", ["lines", "array", "table"])
def test_row_of_200_mb_is_set_aside_and_never_held(tmp_path: Path, shape: str) -> None:
    good, opening, end = {
        "lines": (b'{"prompt": "a", "response": "b"}\n', b'{"prompt": "', b'"}\n'),
        "array": (b'{"prompt": "a", "response": "b"},', b'{"prompt": "', b'"},'),
        "table": (b"a,b\n", b"", b",b\n"),
    }[shape]
    head, tail = {"lines": (b"", b""), "array": (b"[", good[:-1] + b"]"), "table": (b"prompt,response\n", b"")}[shape]
    for name, size in (("small", 3 << 20), ("large", 200 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.write(head + good * 2 + opening)
            for _ in range(size >> 20):
                file.write(b"x" * (1 << 20))
            file.write(end + good + tail)

    grown, _, rows, reasons = peak_growth(2, tmp_path / "small", tmp_path / "large")

    assert "too long: over 2 MB" in reasons
    assert int(rows) == (4 if shape == "array" else 3)
    assert int(grown) < 12 << 20
    (tmp_path / "large").unlink()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("shape", ["lines", "array"])
def test_reading_grows_by_less_than_twice_the_arrow_size(tmp_path: Path, shape: str) -> None:
    rows = [{"prompt": f"What comes after {n}? " * 8, "response": f"It is {n + 1}. " * 12} for n in range(15_000)]
    for name, count in (("small", 2_000), ("large", len(rows))):
        lines = [json.dumps(row) for row in rows[:count]]
        (tmp_path / name).write_text("\n".join(lines) if shape == "lines" else f"[{','.join(lines)}]")

    grown, stored, read_rows, _ = peak_growth(16, tmp_path / "small", tmp_path / "large")

    assert int(read_rows) == len(rows)
    assert int(grown) < 2 * int(stored)
