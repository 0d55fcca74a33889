"""`qlora vote` as people run it: a real process, killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import ConfigError
from qlora_core.evaluation.vote.ballots import BallotBox
from qlora_core.evaluation.vote.server import open_server, open_study

QLORA = Path(sys.executable).parent / "qlora"


@contextmanager
def serving(*arguments: object, env: dict[str, str] | None = None) -> Iterator[tuple[dict, subprocess.Popen]]:
    """`qlora vote serve ... --json`: what it said on standard output, and the process; killed hard at the end."""
    command = [str(QLORA), "vote", "serve", *map(str, arguments), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **(env or {})})
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline()), process
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def post(url: str, **body: object) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_votes_and_links_outlive_a_killed_server(
    tmp_path: Path, write_pairs: Callable[..., Path], qlora: Callable
) -> None:
    pairs, study = write_pairs(6), tmp_path / "votes.sqlite"
    with serving(pairs, "--study", study, "--rater", "ann", "--rater", "ben", "--port", 0) as (said, process):
        assert said["url"] == said["links"]["ann"] and said["items"] == 6
        first = post(said["url"] + "/next")
        request = {"request_id": "r" * 32, "task": first["task"], "choice": "left"}
        second = post(said["url"] + "/vote", **request)
        theirs = post(said["links"]["ben"] + "/next")
        port = said["url"].split(":")[2].split("/")[0]
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    with serving("--study", study, "--rater", "ann", "--port", port) as (_, process):
        assert post(said["url"] + "/vote", **request)["task"] == second["task"]  # the old link, the old request
        assert post(said["links"]["ben"] + "/next")["task"] == theirs["task"]
        view = post(said["url"] + "/next")
        assert (view["task"], view["done"]) == (second["task"], 1)
        done = qlora("vote", "export", tmp_path / "out", "--study", study, "--json")  # while it serves
        exported = json.loads(done.stdout)
        assert exported["votes"] == 1 and len(exported["files"]) == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_import_adds_votes_once(tmp_path: Path, make_box: Callable[..., BallotBox], qlora: Callable) -> None:
    study = make_box(3).journal.path
    (tmp_path / "v.jsonl").write_text('{"item_id": "p1", "rater_id": "eve", "label": "a"}\n')
    for expected in ({"votes": 1, "known": 0, "skipped": 0}, {"votes": 0, "known": 1, "skipped": 0}):
        assert json.loads(qlora("vote", "import", tmp_path / "v.jsonl", "--study", study, "--json").stdout) == expected


def test_commands_without_a_study_say_what_to_do(tmp_path: Path, qlora: Callable) -> None:
    done = qlora("vote", "export", tmp_path / "out", "--study", tmp_path / "none.sqlite", "--json")
    assert done.returncode == 1 and "qlora vote serve" in json.loads(done.stdout)["error"]["message"]
    done = qlora("vote", "serve", "--study", tmp_path / "none.sqlite", "--json")
    assert done.returncode == 2 and "give a file of pairs" in json.loads(done.stdout)["error"]["message"]


def test_other_pairs_or_settings_than_the_studys_are_refused(write_pairs: Callable[..., Path], tmp_path: Path) -> None:
    study = tmp_path / "v.sqlite"
    begun = open_study(study, write_pairs(3), {"raters_per_item": 2, "self_share": None})
    again = open_study(study, write_pairs(3), {"raters_per_item": 2})
    assert again.study_id == begun.study_id and again.settings.self_share == 0.05
    with pytest.raises(ConfigError, match="other pairs"):
        open_study(study, write_pairs(4), {})
    with pytest.raises(ConfigError, match="begun with raters_per_item 2, not 3"):
        open_study(study, None, {"raters_per_item": 3})


def test_other_machines_are_let_in_only_with_a_secret_of_ones_own(make_box: Callable[..., BallotBox]) -> None:
    box = make_box(2)
    options: dict[str, Any] = {"raters": ["ann"], "port": 0, "link_days": 1.0}
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="QLORA_VOTE_SECRET"):
            open_server(box, host=host, environment={}, **options)
    environment = {"QLORA_VOTE_SECRET": "k" * 32}
    server = open_server(
        box, host="0.0.0.0", environment=environment, public_url="https://vote.example.org/x/", **options
    )
    server._socket.close()
    assert server.links["ann"].startswith("https://vote.example.org/x/r/")
    assert not box.journal.path.with_name(box.journal.path.name + ".secret").exists()


def test_a_taken_port_is_told(make_box: Callable[..., BallotBox]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen"):
        open_server(
            make_box(2), raters=[], host="127.0.0.1", port=taken.getsockname()[1], link_days=1.0, environment={}
        )
