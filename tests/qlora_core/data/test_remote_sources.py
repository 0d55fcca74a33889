"""Sources elsewhere: which files they stand for, and what is said when they cannot be had."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qlora_core.data.remote_sources import HubName, is_remote, localize_sources, parse_hub_name
from qlora_core.data.source_files import list_source_files
from qlora_core.digest import digest_bytes
from qlora_core.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Shelf:
    """Object storage in a dict; the real one passes its own tests in the store."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        self.objects = dict(objects)

    def list(self, bucket: str, prefix: str) -> list[str]:
        start = f"{bucket}/"
        return sorted(key.removeprefix(start) for key in self.objects if key.startswith(start + prefix))

    def fetch(self, bucket: str, key: str, path: Path) -> None:
        path.write_bytes(self.objects[f"{bucket}/{key}"])


OBJECTS = {
    "b/sets/a.jsonl": b"a",
    "b/sets/deep/c.csv.gz": b"c",
    "b/sets/readme.md": b"r",
    "b/sets-old/d.jsonl": b"d",
    "b/rows": b"x",
}


def fetched(folder: Path, *sources: str, objects: Mapping[str, bytes] = OBJECTS) -> dict[str, bytes]:
    paths = localize_sources(sources, folder / "cache", lambda source: folder / source, lambda: Shelf(objects))
    return {file.name: file.path.read_bytes() for file in list_source_files(paths)}


def test_prefix_is_a_folder_and_a_key_is_a_file(tmp_path: Path) -> None:
    assert fetched(tmp_path, "s3://b/sets") == {"sets/a.jsonl": b"a", "sets/deep/c.csv.gz": b"c"}
    assert fetched(tmp_path, "s3://b/sets/") == fetched(tmp_path, "s3://b/sets")
    assert fetched(tmp_path, "s3://b/rows") == {"rows": b"x"}
    assert set(fetched(tmp_path, "s3://b")) == {"b/sets/a.jsonl", "b/sets/deep/c.csv.gz", "b/sets-old/d.jsonl"}


def test_local_sources_stay_and_order_is_kept(tmp_path: Path) -> None:
    (tmp_path / "here.json").write_bytes(b"h")

    assert list(fetched(tmp_path, "s3://b/rows", "here.json")) == ["rows", "here.json"]


def test_object_that_is_gone_is_not_read_from_an_earlier_time(tmp_path: Path) -> None:
    fetched(tmp_path, "s3://b/sets")
    left = {key: value for key, value in OBJECTS.items() if "deep" not in key}

    assert list(fetched(tmp_path, "s3://b/sets", objects=left)) == ["sets/a.jsonl"]


def test_object_storage_is_not_asked_for_without_need(tmp_path: Path) -> None:
    def never() -> Shelf:
        raise AssertionError

    assert localize_sources(["a"], tmp_path, lambda source: tmp_path / source, never) == [tmp_path / "a"]


@pytest.mark.parametrize(
    ("source", "objects", "complaint"),
    [
        ("s3://b/nothing", OBJECTS, "there is no such object, and no dataset file"),
        ("s3://", OBJECTS, "names no bucket"),
        ("s3://b/up", {"b/up/../../evil.json": b""}, "no name for a file"),
        ("s3://b/up", {"b/up//a.json": b""}, "no name for a file"),
    ],
)
def test_unusable_object_is_named(tmp_path: Path, source: str, objects: Mapping[str, bytes], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        fetched(tmp_path, source, objects=objects)


def test_hub_names_need_a_commit() -> None:
    name = f"hf://owner/na-me@{COMMIT}"

    assert parse_hub_name(name) == HubName("owner/na-me", COMMIT, None, None)
    assert parse_hub_name(f"{name}:train") == HubName("owner/na-me", COMMIT, None, "train")
    assert parse_hub_name(f"{name}:main/train") == HubName("owner/na-me", COMMIT, "main", "train")
    assert is_remote(name) and is_remote("s3://b/k") and not is_remote("data/s3.json")


@pytest.mark.parametrize(
    "source", ["hf://owner/name", "hf://owner/name@main", f"hf://name@{COMMIT}", f"hf://owner/name@{COMMIT}:a/b/c"]
)
def test_hub_name_without_a_commit_is_refused_before_anything_is_asked(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match="40 hex digits"):
        fetched(tmp_path, source)


def test_local_folder_never_stands_in_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DataError, match="would be read instead"):
        fetched(tmp_path, f"hf://owner/name@{COMMIT}")


FILES = {
    "train.jsonl": b'{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n',
    "README.md": b"# A set\n",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a client needs to load one public data set at one commit; all else is 404."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        listed = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in FILES.items()]
        about = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES], "tags": []}
        answers = {
            f"/api/datasets/owner/name/revision/{COMMIT}": json.dumps(about).encode(),
            f"/api/datasets/owner/name/tree/{COMMIT}": json.dumps(listed).encode(),
            **{f"/datasets/owner/name/resolve/{COMMIT}/{name}": data for name, data in FILES.items()},
        }
        body = answers.get(path)
        self.send_response_only(200 if body is not None else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest_bytes(body or b"")}"')
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound" if "/owner/name/" in path else "RepoNotFound")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


LOAD = f"""
import sys
from pathlib import Path
from qlora_core.config.curation import ReadersConfig
from qlora_core.data.reading import read_sources
from qlora_core.data.remote_sources import localize_sources
from qlora_core.data.source_files import list_source_files
from qlora_core.errors import DataError

for source in ("hf://owner/name@{COMMIT}", "hf://owner/name@{COMMIT}:default/train", "hf://owner/other@{COMMIT}"):
    try:
        paths = localize_sources([source], Path(sys.argv[1]), Path, lambda: None)
        [reading] = read_sources(list_source_files(paths), ReadersConfig())
        print(reading.name, [row.messages[0].content for row in reading.rows])
    except DataError as error:
        print(error)
"""


@pytest.mark.integration
def test_set_of_the_hub_becomes_parquet_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", LOAD, str(tmp_path / "out")]

    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    server.shutdown()
    server.server_close()
    first, second, third = done.stdout.strip().split("\n")
    assert first == second == "name/train.parquet ['a', 'c']"
    assert f"hf://owner/other@{COMMIT} cannot be loaded" in third and "HF_HUB_OFFLINE" in third
