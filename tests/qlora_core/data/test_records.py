"""From bytes to records: which kind of file it is, on which line each record starts, what is set aside."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_core.data.containers.json_array import array_elements
from qlora_core.data.containers.record import Quarantined, Record
from qlora_core.data.records import read_records
from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def records(path: Path, data: bytes | None = None, *, max_row_bytes: int = 1 << 20) -> list[tuple[int, Any]]:
    if data is not None:
        path.write_bytes(data)
    found = list(read_records(SourceFile(path.name, path), max_row_bytes))
    return [(each.line, each.value if isinstance(each, Record) else each.kind) for each in found]


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(JSON, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    piece=st.integers(1, 9),
)
def test_array_read_in_any_pieces_equals_the_whole(
    values: list[object], indent: int | None, ascii_only: bool, piece: int
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    stream = io.BytesIO(text + b"\n")

    found = list(array_elements("a", lambda: stream.read(piece), 1 << 20))

    assert [each.value for each in found if isinstance(each, Record)] == values
    assert len(found) == len(values)
    if indent is not None and values:
        assert found[0].line == 2


def test_bad_elements_of_an_array_are_set_aside_alone(tmp_path: Path) -> None:
    data = b'[\n{"a": 1},\n{"a": "\xff"},\n{"a": nul},\n{"a": "]}"},\n' + b"[" * 600 + b"]" * 600 + b",\n7]"

    assert records(tmp_path / "a", data) == [
        (2, {"a": 1}),
        (3, "not UTF-8"),
        (4, "not JSON"),
        (5, {"a": "]}"}),
        (6, "not JSON"),
        (7, 7),
    ]


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_bad_element_that_shares_its_line_is_told_by_its_number(piece: int) -> None:
    stream = io.BytesIO(b'[1, nul, "' + b"x" * 60 + b'",\nnul, 5,\n6, "\xff"]')

    found = list(array_elements("a", lambda: stream.read(piece), 50))

    faults = [(entry.line, entry.kind, entry.reason) for entry in found if isinstance(entry, Quarantined)]
    assert [(line, kind) for line, kind, _ in faults] == [
        (1, "not JSON"),
        (1, "too long"),
        (2, "not JSON"),
        (3, "not UTF-8"),
    ]
    numbers = [reason.partition(" (element ")[2] for _, _, reason in faults]
    assert numbers == ["2 of the array)", "3 of the array)", "", "7 of the array)"]


def test_nesting_is_limited_whoever_calls(tmp_path: Path) -> None:
    fits, exceeds = ("[" * depth + "]" * depth for depth in (499, 500))
    quoted = json.dumps({"a": "[" * 2000})
    data = f'{{"a": {fits}}}\n{{"a": {exceeds}}}\n{quoted}\n'.encode()

    kinds = [value if isinstance(value, str) else "read" for _, value in records(tmp_path / "a", data)]

    assert kinds == ["read", "not JSON", "read"]


@pytest.mark.parametrize("separator", [b"\n", b"\r\n"])
def test_long_records_are_set_aside_unparsed(tmp_path: Path, separator: bytes) -> None:
    rows = [b'{"a": 1}', b'{"a": "%s"}' % (b"x" * 5_000_000), b'{"a": 2}']
    expected = [{"a": 1}, "too long", {"a": 2}]

    lines = records(tmp_path / "lines", separator.join(rows) + separator, max_row_bytes=100)
    array = records(tmp_path / "array", b"[" + b",".join(rows) + b"]", max_row_bytes=100)

    assert [value for _, value in lines] == [value for _, value in array] == expected
    assert [line for line, _ in lines] == [1, 2, 3]


def test_record_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    row = b'{"a": 12}'

    assert [value for _, value in records(tmp_path / "a", row + b"\r\n" + row, max_row_bytes=len(row))] == [
        {"a": 12}
    ] * 2
    assert records(tmp_path / "b", row + b"\n" + b'{"a": 1}', max_row_bytes=len(row) - 1) == [
        (1, "too long"),
        (2, {"a": 1}),
    ]


def test_table_with_quoted_values_knows_its_lines(tmp_path: Path) -> None:
    data = (
        b'\xef\xbb\xbfQuestion,Best Answer\r\n"a, ""b""",c\r\n\r\n"two\r\nlines",d\r\n5" pipe,e\r\nx,y,z\r\n\xff,f\r\n'
    )

    assert records(tmp_path / "a", data) == [
        (2, {"question": 'a, "b"', "best_answer": "c"}),
        (4, {"question": "two\nlines", "best_answer": "d"}),
        (6, {"question": '5" pipe', "best_answer": "e"}),
        (7, "wrong columns"),
        (8, "not UTF-8"),
    ]


TABS = [
    (b"inputs\ttargets\na\tb\n", [{"inputs": "a", "targets": "b"}]),
    (b"Say it.\tb\nc\td\n", [{"inputs": "Say it.", "targets": "b"}, {"inputs": "c", "targets": "d"}]),
    (b'"Hi" she said.\t"b"\nc\td\n', [{"inputs": '"Hi" she said.', "targets": '"b"'}, {"inputs": "c", "targets": "d"}]),
    (b'prompt\tresponse\n"say ""a"""\t"b\tc"\n', [{"prompt": 'say "a"', "response": "b\tc"}]),
    (b"id\tprompt\tresponse\n1\ta\tb\n", [{"id": "1", "prompt": "a", "response": "b"}]),
]


@pytest.mark.parametrize(("data", "values"), TABS, ids=["header", "none", "marks", "quoted", "three"])
def test_tab_separated_with_and_without_header(tmp_path: Path, data: bytes, values: list[object]) -> None:
    assert [value for _, value in records(tmp_path / "a", data)] == values


def test_quoted_value_that_never_ends_is_refused_with_its_line(tmp_path: Path) -> None:
    data = b'prompt,response\na,b\n"c,d\n' + b"e,f\n" * 100

    for limit in (100, 1 << 20):
        with pytest.raises(DataError, match="quoted value that starts on line 3"):
            records(tmp_path / "a", data, max_row_bytes=limit)


def test_parquet_rows_have_numbers_and_bad_values_are_set_aside(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"x" * 200, b"d"]).view(pa.string())
    table = pa.table({"prompt": texts, "response": ["b"] * 4, "system": [None, None, None, "s"]})
    pq.write_table(table, tmp_path / "a")
    packed = gzip.compress((tmp_path / "a").read_bytes())

    for data in (None, packed):
        assert records(tmp_path / "a", data, max_row_bytes=150) == [
            (1, {"prompt": "a", "response": "b"}),
            (2, "not UTF-8"),
            (3, "too long"),
            (4, {"prompt": "d", "response": "b", "system": "s"}),
        ]


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"] * 1000}), tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    data[len(data) // 2 :] = b"\0" * (len(data) - len(data) // 2)

    with pytest.raises(DataError, match="damaged Parquet file"):
        records(tmp_path / "a", bytes(data))


def test_gzip_that_ends_early_is_refused_with_the_last_whole_line(tmp_path: Path) -> None:
    lines = b"".join(b'{"a": "%d"}\n' % number for number in range(100_000))
    cut = gzip.compress(lines)[:-5000]
    read = 0

    (tmp_path / "a").write_bytes(cut)
    with pytest.raises(DataError, match=r"a is a damaged gzip file: after line \d+") as caught:
        for _ in read_records(SourceFile("a", tmp_path / "a"), 1 << 20):
            read += 1
    assert f"after line {read} " in str(caught.value)


KINDS = [
    (b'{"a": 1}\nnot json\n', [(1, {"a": 1}), (2, "not JSON")]),
    (b'not json\n{"a": 1}\n{"a": 2}\n', [(1, "not JSON"), (2, {"a": 1}), (3, {"a": 2})]),
    (b'["x"]\n{"a": 1}\n{"a": 2}\n', [(1, ["x"]), (2, {"a": 1}), (3, {"a": 2})]),
    (b"[" * 9000 + b'\n{"a": 1}\n{"a": 2}\n', [(1, "not JSON"), (2, {"a": 1}), (3, {"a": 2})]),
    (b'{\n"a": 1\n}\n', [(1, {"a": 1})]),
    (b"[]", []),
    (b'[\n["x"],\n["y"]\n]', [(2, ["x"]), (3, ["y"])]),
]


@pytest.mark.parametrize(("data", "expected"), KINDS, ids=[f"kind {number}" for number in range(len(KINDS))])
def test_kind_of_a_file_is_told_by_its_content(tmp_path: Path, data: bytes, expected: list[Any]) -> None:
    assert records(tmp_path / "rows.csv", data) == expected
    assert records(tmp_path / "rows.parquet", gzip.compress(data)) == expected


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_table_that_the_csv_module_wrote_is_read_alike(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    import csv

    marks = str.maketrans({"\r": " "})
    rows = [tuple(value.translate(marks) for value in row) for row in rows if all(value.strip() for value in row)]  # type: ignore[misc]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "response"), *rows])

    found = records(tmp_path / "a", text.getvalue().encode(errors="replace"))

    cleaned = [tuple(value.encode(errors="replace").decode() for value in row) for row in rows]
    assert [tuple(value.values()) for _, value in found] == cleaned


def test_quarantine_reasons_are_short_and_storable(tmp_path: Path) -> None:
    found = list(read_records(_file(tmp_path, b'{"a": 1}\n{"a": "\xff"}\n'), 1 << 20))

    [entry] = [each for each in found if isinstance(each, Quarantined)]
    assert (entry.file, entry.line, entry.kind) == ("a", 2, "not UTF-8")


def _file(folder: Path, data: bytes) -> SourceFile:
    (folder / "a").write_bytes(data)
    return SourceFile("a", folder / "a")
