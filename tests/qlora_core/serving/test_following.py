"""A server whose names follow aliases of a real SQLite registry, while those are moved, lost and pointed at rubbish."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from mlflow import MlflowClient

from qlora_core.adapters.on_base import write_golden_of
from qlora_core.errors import ConfigError, EngineStoppedError
from qlora_core.model.adapter_set import AdapterSet
from qlora_core.registry.aliases import CHALLENGER, CHAMPION, remove_alias, set_alias
from qlora_core.registry.connection import connect, find_or_create_experiment
from qlora_core.registry.model_address import AddressBook
from qlora_core.registry.versions import LINEAGE_TAGS, get_version, register_adapter
from qlora_core.serving.admission import AdapterSource, base_digest
from qlora_core.serving.engine import Engine
from qlora_core.serving.following import Follower, Following
from qlora_core.serving.served import Served, open_served
from qlora_core.serving.server import ModelServer, open_model_server

QLORA = Path(sys.executable).parent / "qlora"
NAME = "assistant"
ADDRESS = f"models:/{NAME}@{CHAMPION}"
EVERY_S = 0.1
ANSWER = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 24}
Call = Callable[..., Any]
VERSIONS = ("support", "legal", "tales")


@dataclass(frozen=True)
class Registry:
    """Versions 1, 2, 3 are the adapters support, legal, tales; none has an alias."""

    uri: str
    folder: Path
    client: MlflowClient

    @property
    def database(self) -> Path:
        return self.folder / "mlflow.db"

    def champion(self, version: str) -> None:
        set_alias(self.client, NAME, CHAMPION, version)


@pytest.fixture
def registry(base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path) -> Registry:
    folder = tmp_path / ".qlora"
    folder.mkdir()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = connect(uri)
    experiment = find_or_create_experiment(client, "tests", folder)
    lineage = dict.fromkeys(LINEAGE_TAGS, "x") | {"quantized_base_digest": base_digest(base_folder)}
    for name in VERSIONS:
        made = copytree(adapter_folders[name], tmp_path / name)
        write_golden_of(base_folder, made, [])
        run_id = client.create_run(experiment).info.run_id
        register_adapter(client, NAME, made, run_id=run_id, run_key=name, lineage=lineage)
    return Registry(uri, folder, client)


@pytest.fixture
def texts(ask: Call) -> dict[str, str]:
    """What each version says, from the server that has them as folders."""
    found = {
        str(number): ask("/chat/completions", model=name, **ANSWER).json["choices"][0]["message"]["content"]
        for number, name in enumerate(VERSIONS, 1)
    }
    assert len(set(found.values())) == 3
    return found


@dataclass(frozen=True)
class Running:
    server: ModelServer
    served: Served
    call: Call

    def says(self, name: str = "champion") -> str:
        reply = self.call(self.server.url, "POST", "/chat/completions", {"model": name, **ANSWER})
        assert reply.status == 200, reply.body
        return reply.json["choices"][0]["message"]["content"]

    def card(self, name: str = "champion") -> dict[str, Any]:
        return self.call(self.server.url, "GET", f"/models/{name}").json["qlora"]

    @property
    def adapters(self) -> AdapterSet:
        assert isinstance(self.served.model, AdapterSet)
        return self.served.model


@contextmanager
def following(base: Path, registry: Registry, call: Call, asked: str | None = None, **follow: str) -> Iterator[Running]:
    """A server of `legal` by its folder and of the champion, which follows, in a thread of this process.

    `asked`: the registry that is asked again, where it is another one than the first version came from.
    """
    book = AddressBook(registry.uri, registry.folder / "cache")
    first = book.fetch(ADDRESS, book.version_of(ADDRESS) or "")
    champion = AdapterSource("champion", first.folder, ADDRESS, first.version, first.quantized_base_digest)
    sources = [champion, AdapterSource("fixed", registry.folder.parent / "legal")]
    if asked is not None:
        book = AddressBook(asked, registry.folder / "cache")
    wanted = Following(book, follow or {"champion": ADDRESS}, EVERY_S)
    with open_served(base, sources, base_name="base", precision="float32", device="cpu") as served:
        server = open_model_server(served, host="127.0.0.1", port=0, environment={}, following=wanted)
        thread = threading.Thread(target=server.run)
        thread.start()
        running = Running(server, served, call)
        try:
            until(lambda: server.engine.alive)
            yield running
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()


def until(done: Callable[[], bool], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_after_a_promotion_the_new_champion_answers_and_nothing_under_way_is_lost(
    base_folder: Path, registry: Registry, call: Call, texts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qlora_core.serving.following")
    registry.champion("1")
    with following(base_folder, registry, call) as running, ThreadPoolExecutor(1) as pool:
        assert (running.says(), running.card()["version"]) == (texts["1"], "1")
        slow = running.adapters.base.register_forward_pre_hook(lambda module, args: time.sleep(0.2))
        under_way = pool.submit(running.says)
        until(lambda: running.server.engine.load.answering == 1)
        registry.champion("2")
        until(lambda: running.card()["version"] == "2")
        assert not under_way.done() and "champion" in running.adapters.names
        slow.remove()
        assert running.says() == texts["2"]  # beside it, in one batch or after it
        assert under_way.result(60) == texts["1"]  # begun with the old one, ended with it
        assert running.says("fixed") == texts["2"] and running.card("fixed")["version"] is None
        until(lambda: "champion" not in running.adapters.names)  # the old one's memory is free again
        assert len(running.adapters.names) == 2
        registry.champion("3")
        until(lambda: running.says() == texts["3"])
        registry.champion("1")  # a roll-back is a move, too
        until(lambda: running.says() == texts["1"])
        until(lambda: len(running.adapters.names) == 2)
    assert f"{ADDRESS} is version 2 now (was 1)" in caplog.text
    assert f"{ADDRESS} is version 1 now (was 3)" in caplog.text


def test_answers_keep_coming_while_the_alias_moves_to_and_fro(
    base_folder: Path, registry: Registry, call: Call, texts: dict[str, str]
) -> None:
    registry.champion("1")
    said: list[str] = []
    with following(base_folder, registry, call) as running:
        stop = threading.Event()

        def keep_asking() -> None:
            while not stop.is_set():
                said.append(running.says())

        with ThreadPoolExecutor(3) as pool:
            askers = [pool.submit(keep_asking) for _ in range(3)]
            try:
                for version in ("2", "1", "3", "2"):
                    registry.champion(version)
                    until(lambda wanted=version: running.card()["version"] == wanted)
            finally:
                stop.set()
            for asker in askers:
                asker.result(30)  # raises where a request failed
        assert running.says() == texts["2"]
    assert set(said) <= set(texts.values())


def test_an_alias_that_is_gone_and_a_registry_that_is_away_change_nothing_and_are_told(
    base_folder: Path, registry: Registry, call: Call, texts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qlora_core.serving.following")
    registry.champion("1")
    away = registry.database.with_suffix(".away")
    with following(base_folder, registry, call) as running:
        assert running.card()["note"] is None
        remove_alias(registry.client, NAME, CHAMPION)
        until(lambda: "names no version any more" in (running.card()["note"] or ""))
        assert running.says() == texts["1"]
        registry.champion("1")
        until(lambda: running.card()["note"] is None)

        registry.database.rename(away)
        until(lambda: "there is no registry at" in (running.card()["note"] or ""))
        time.sleep(5 * EVERY_S)
        assert running.says() == texts["1"] and not registry.database.exists()
        away.rename(registry.database)
        registry.champion("2")
        until(lambda: running.says() == texts["2"])
        assert running.card()["note"] is None
    lines = [record.getMessage() for record in caplog.records]
    assert sum("names no version any more; version 1 answers on" in line for line in lines) == 1  # once, not every time
    assert sum("there is no registry at" in line for line in lines) == 1


def test_a_server_that_does_not_answer_is_told_once(
    base_folder: Path, registry: Registry, call: Call, texts: dict[str, str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nobody listens there; MLflow words every refusal differently."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry.champion("1")
    looked_up: list[str] = []
    version_of = AddressBook.version_of
    monkeypatch.setattr(AddressBook, "version_of", lambda book, at: looked_up.append(at) or version_of(book, at))
    with following(base_folder, registry, call, asked="http://127.0.0.1:9") as running:
        until(lambda: len(looked_up) >= 5)
        assert "MLflow failed while opening http://127.0.0.1:9" in running.card()["note"]
        assert running.says() == texts["1"]
    assert sum("cannot be looked up" in record.getMessage() for record in caplog.records) == 1


def test_a_version_that_cannot_be_served_leaves_the_one_before_in_place(
    base_folder: Path, registry: Registry, call: Call, texts: dict[str, str]
) -> None:
    registry.client.set_model_version_tag(NAME, "2", "quantized_base_digest", "f" * 64)
    location = registry.client.get_model_version_download_uri(NAME, "3").removeprefix("file://")
    weights = next(Path(location).rglob("adapter_model.safetensors"))
    registry.champion("1")
    with following(base_folder, registry, call) as running:
        registry.champion("2")
        until(lambda: "was trained on base ffff" in (running.card()["note"] or ""))
        assert (running.says(), running.card()["version"]) == (texts["1"], "1")
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        registry.champion("3")
        until(lambda: "does not hold the adapter it was registered with" in (running.card()["note"] or ""))
        assert (running.says(), len(running.adapters.names)) == (texts["1"], 2)
        registry.champion("1")
        until(lambda: running.card()["note"] is None)


def test_golden_logits_that_do_not_come_out_are_found_before_a_version_answers(
    base_folder: Path, registry: Registry, call: Call, texts: dict[str, str], tmp_path: Path
) -> None:
    """Registered whole, for this base, and yet not what it was: its settings were changed before it was registered."""
    odd = copytree(tmp_path / "legal", tmp_path / "odd")
    settings = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 99}))
    lineage = dict.fromkeys(LINEAGE_TAGS, "x") | {"quantized_base_digest": base_digest(base_folder)}
    run_id = get_version(registry.client, NAME, "1").run_id
    version = register_adapter(registry.client, NAME, odd, run_id=run_id, run_key="odd", lineage=lineage).version
    registry.champion("1")
    with following(base_folder, registry, call) as running:
        registry.champion(version)
        until(lambda: "logits differ" in (running.card()["note"] or ""))
        assert (running.says(), len(running.adapters.names)) == (texts["1"], 2)


def test_a_name_whose_alias_comes_later_is_answered_for_from_then_on(
    base_folder: Path, registry: Registry, call: Call, texts: dict[str, str]
) -> None:
    registry.champion("1")
    later = f"models:/{NAME}@{CHALLENGER}"
    with following(base_folder, registry, call, champion=ADDRESS, **{later: later}) as running:
        assert call(running.server.url, "GET", f"/models/{later}").status == 404
        set_alias(registry.client, NAME, CHALLENGER, "3")
        until(lambda: call(running.server.url, "GET", f"/models/{later}").status == 200)
        assert (running.says(later), running.says()) == (texts["3"], texts["1"])


def test_what_is_done_between_steps_gives_its_result_or_its_error_and_answers_go_on(
    served: Served, answering: Callable[..., Any], call: Call
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in the task")

    with answering(served) as server:
        assert server.engine.between_steps(lambda: threading.current_thread().name) == "engine"
        with pytest.raises(ZeroDivisionError, match="in the task"):
            server.engine.between_steps(fail)
        assert call(server.url, "POST", "/chat/completions", {"model": "base", **ANSWER}).status == 200
        engine = server.engine
    with pytest.raises(EngineStoppedError):
        engine.between_steps(fail)


def test_nothing_can_follow_where_no_adapter_is_served(base_folder: Path, tmp_path: Path) -> None:
    from qlora_core.serving.desk import Desk

    wanted = Following(AddressBook(f"sqlite:///{tmp_path / 'none.db'}", tmp_path), {"x": ADDRESS}, 1.0)
    with open_served(base_folder, [], device="cpu") as served, pytest.raises(ConfigError, match="no adapter is served"):
        Follower(Desk(served, Engine(served.model, rows=1, waiting=1)), wanted)


def test_qlora_serve_answers_with_the_new_champion(
    base_folder: Path, registry: Registry, call: Call, texts: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "pipeline.yaml").write_text("data: {sources: [rows.json]}\nbase: {model: demo}\n")
    registry.champion("1")
    command = [str(QLORA), "serve", str(base_folder), "--registry", str(tmp_path / "pipeline.yaml"), "--port", "0",
               "--precision", "float32", "--follow-every", "0.2", "--json"]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ})
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["models"] == ["nf4", ADDRESS]

        def answer() -> str:
            reply = call(said["url"], "POST", "/chat/completions", {"model": ADDRESS, **ANSWER})
            return reply.json["choices"][0]["message"]["content"]

        assert answer() == texts["1"]
        registry.champion("2")
        until(lambda: answer() == texts["2"], 30)
        assert f"{ADDRESS} is version 2 now (was 1)" in log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
