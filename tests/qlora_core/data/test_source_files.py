"""Which files a list of sources stands for."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_core.config.curation import ReadersConfig
from qlora_core.data.reading import read_sources
from qlora_core.data.source_files import list_source_files
from qlora_core.errors import DataError


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_folder_gives_its_dataset_files_sorted_with_relative_names(tmp_path: Path) -> None:
    for name in ("sets/b.json", "sets/a/z.jsonl.gz", "sets/README.md", "sets/.hidden.json", "sets/.cache/c.json"):
        _touch(tmp_path / name)

    assert [file.name for file in list_source_files([tmp_path / "sets"])] == ["sets/a/z.jsonl.gz", "sets/b.json"]


def test_folder_of_mixed_formats_is_read_whole(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{number}", "response": "a"} for number in range(2)]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
    table = b"prompt,response\nq0,a\nq1,a\n"
    files = {
        "a.json": json.dumps(pairs).encode(),
        "b.jsonl": lines,
        "c.csv": table,
        "d.TSV": table.replace(b",", b"\t"),
        "e.ndjson.gz": gzip.compress(lines),
        "f.csv.gz": gzip.compress(table),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "g.parquet")

    readings = read_sources(list_source_files([tmp_path]), ReadersConfig())

    assert [reading.name.rpartition("/")[2] for reading in readings] == [*files, "g.parquet"]
    assert len({tuple(row.id for row in reading.rows) for reading in readings}) == 1


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    for place in ("here", "there"):
        _touch(tmp_path / place / "sets" / "a.json")

    names = [[file.name for file in list_source_files([tmp_path / place / "sets"])] for place in ("here", "there")]

    assert names[0] == names[1]


def test_file_named_directly_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    path = _touch(tmp_path / "rows.txt")

    assert [file.path for file in list_source_files([path])] == [path]


def test_equal_names_are_told_apart_and_a_file_is_listed_once(tmp_path: Path) -> None:
    one, two = _touch(tmp_path / "a/rows.json"), _touch(tmp_path / "b/rows.json")

    assert [file.name for file in list_source_files([one, two, one])] == ["rows.json", "rows.json#2"]


def test_missing_source_names_it_and_says_where_relative_paths_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json.*does not exist.*folder of the config file"):
        list_source_files([tmp_path / "nowhere.json"])


def test_messages_name_the_setting_that_lists_the_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("nope.jsonl", "empty"):
        with pytest.raises(DataError, match=rf"{source}', named in data\.sources"):
            list_source_files([tmp_path / source])
        with pytest.raises(DataError, match=rf"{source}', named in evaluate\.prompt_sets") as caught:
            list_source_files([tmp_path / source], setting="evaluate.prompt_sets")
        assert "data.sources" not in str(caught.value)


def test_folder_without_dataset_files_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "sets/README.md")

    with pytest.raises(DataError, match="folder without dataset files"):
        list_source_files([tmp_path / "sets"])
