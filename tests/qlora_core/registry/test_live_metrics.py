"""A sweep in MLflow while it trains: every point once, with MLflow away, killed, or the driver killed in the middle."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from qlora_core.registry.connection import connect, find_or_create_experiment
from qlora_core.registry.live_metrics import LiveMetrics, LiveSweep
from qlora_core.registry.logged_run import STEP_METRICS
from qlora_core.registry.tracking import SweepRecord, log_sweep
from qlora_core.training.step_tail import PACK_LOG, STEP_LOG

DIGEST = "0123456789abcdef" * 4
STARTED = 1_790_000_000.0
SERVER_START_S = 120.0


def step_line(trial: str, step: int, rate: float = 1e-3, at: float = 0.0) -> dict[str, Any]:
    return {
        "time": STARTED + step + at,
        "trial": trial,
        "step": step,
        "loss": 3.0 - step / 1000,
        "learning_rate": rate,
        "grad_norm": 0.5,
        "tokens": 64,
        "tokens_per_s": 640.0,
        "memory_bytes": 4096,
        "process_memory_bytes": 1 << 30,
    }


def pack_line(number: int) -> dict[str, Any]:
    return {
        "time": STARTED + number,
        "line": number,
        "trials": 2,
        "tokens_per_s": 1280.0,
        "process_memory_bytes": 1 << 30,
    }


def row(trial: str, state: str = "waiting", *, steps: int = 0, loss: float | None = None) -> dict[str, Any]:
    curve = [{name: step_line(trial, step)[name] for name in ("step", "loss", "learning_rate", "grad_norm", "tokens")}
             for step in range(1, steps + 1)]  # fmt: skip
    return {
        "id": trial,
        "params": {"lora_rank": 8, "learning_rate": 0.001},
        "state": state,
        "loss": loss,
        "steps": steps,
        "seconds": 3.0,
        "error": "loss is NaN" if state == "failed" else None,
        "rungs": [] if loss is None else [{"step": steps, "loss": loss}],
        "curve": curve,
        "role": "trial",
    }


class Diaries:
    """The diaries of a sweep's trials, written as workers write them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, trial: str, *lines: dict[str, Any]) -> None:
        (self.folder / trial).mkdir(parents=True, exist_ok=True)
        self.write(self.folder / trial / STEP_LOG, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, path: Path, text: str) -> None:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)


@pytest.fixture
def diaries(tmp_path: Path) -> Diaries:
    return Diaries(tmp_path / "trials")


@pytest.fixture
def live_sweep(tracking_uri: str, work_dir: Path, diaries: Diaries, request: pytest.FixtureRequest) -> LiveSweep:
    return LiveSweep(
        tracking_uri, "tests", work_dir, diaries.folder, request.node.name, "a sweep", {"base_model": "demo"}, DIGEST
    )


def children(client: MlflowClient, sweep: LiveSweep) -> tuple[Any, dict[str, Any]]:
    """The sweep's one parent, and its trials' runs by name."""
    experiment = client.get_experiment_by_name(sweep.experiment)
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`qlora.sweep_key` = '{sweep.sweep_key}'")
    runs = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    by_name = {str(run.info.run_name): run for run in runs}
    assert len(by_name) == len(runs), "a trial has two runs"
    return parent, by_name


def history(client: MlflowClient, run: Any, name: str) -> list[tuple[int, float]]:
    points = client.get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: (point.timestamp, point.step))]


def wait_until(true: Callable[[], bool], *, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_points_are_in_mlflow_while_the_sweep_trains_and_each_is_there_once(
    client: MlflowClient, experiment_id: str, live_sweep: LiveSweep, diaries: Diaries, tmp_path: Path
) -> None:
    with LiveMetrics(live_sweep, send_every_s=0.05) as metrics:
        metrics.take(row("t000"))
        metrics.take(row("t001"))
        diaries.add("t000", *(step_line("t000", step) for step in range(1, 301)))

        def seen() -> bool:
            runs = client.search_runs([experiment_id], f"tags.`qlora.run_key` = '{live_sweep.sweep_key}/t000'")
            return bool(runs) and runs[0].data.metrics.get("train/loss") == 3.0 - 300 / 1000

        wait_until(seen)
        parent, runs = children(client, live_sweep)
        assert parent.info.status == runs["t000"].info.status == "RUNNING"
        # The worker died after a half-written line, and steps 299 and 300 are trained again, to the same end;
        # then a roll-back to step 300, from where the rate is half.
        diaries.write(diaries.folder / "t000" / STEP_LOG, '{"time": 17, "st\n')
        diaries.add("t000", step_line("t000", 299, at=900.0), step_line("t000", 300, at=900.0))
        diaries.add("t000", step_line("t000", 301), step_line("t000", 301, rate=5e-4, at=900.0))
        diaries.write(diaries.folder / f"host-1{PACK_LOG}", json.dumps(pack_line(1)) + "\n")
        metrics.take(row("t000", "complete", steps=301, loss=1.5))
        metrics.take(row("t001", "failed"))
    parent, runs = children(client, live_sweep)
    assert parent.info.status == "FINISHED"
    assert {name: run.info.status for name, run in runs.items()} == {"t000": "FINISHED", "t001": "FAILED"}
    wanted = [*range(1, 302), 301]
    for name in STEP_METRICS:
        assert [step for step, _ in history(client, runs["t000"], f"train/{name}")] == wanted, name
    assert history(client, runs["t000"], "train/learning_rate")[-2:] == [(301, 1e-3), (301, 5e-4)]
    assert history(client, runs["t000"], "validation/loss") == [(301, 1.5)]
    assert history(client, parent, "pack/host-1/tokens_per_s") == [(1, 1280.0)]
    assert runs["t000"].data.params["lora_rank"] == "8"
    assert runs["t000"].data.tags["trial_state"] == "complete"
    assert runs["t001"].data.tags["error"] == "loss is NaN"
    assert runs["t000"].inputs.dataset_inputs[0].dataset.digest == DIGEST[:36]

    # Registration adds what a candidate has and repeats nothing of the trials.
    swept = {"method": "grid", "best": "t000", "trials": [row("t000", "complete", steps=301, loss=1.5)]}
    swept["trials"].append(row("t001", "failed"))
    for entry in swept["trials"][0]["curve"][300:]:
        entry["learning_rate"] = 5e-4
    record = SweepRecord(
        "a candidate", "registered", {}, swept, DIGEST, {}, sweep_key=live_sweep.sweep_key, step_logs=diaries.folder
    )
    assert log_sweep(client, experiment_id, record) == parent.info.run_id
    other = SweepRecord("another one", "registered", {}, swept, DIGEST, {}, sweep_key=live_sweep.sweep_key)
    second = client.get_run(log_sweep(client, experiment_id, other))
    assert second.data.tags["qlora.sweep_run"] == parent.info.run_id
    parent, runs = children(client, live_sweep)
    assert (parent.info.run_name, parent.info.status) == ("registered", "FINISHED")
    assert [step for step, _ in history(client, runs["t000"], "train/loss")] == wanted
    assert history(client, runs["t000"], "loss") == [(301, 1.5)]


def test_an_interrupted_sweep_goes_on_in_the_same_runs(
    client: MlflowClient, live_sweep: LiveSweep, diaries: Diaries
) -> None:
    diaries.add("t000", step_line("t000", 1))
    with pytest.raises(KeyboardInterrupt), LiveMetrics(live_sweep, send_every_s=60) as metrics:
        metrics.take(row("t000"))
        raise KeyboardInterrupt
    parent, runs = children(client, live_sweep)
    assert parent.info.status == runs["t000"].info.status == "KILLED"
    first = runs["t000"].info.run_id
    diaries.add("t000", step_line("t000", 2))
    with LiveMetrics(live_sweep, send_every_s=60) as metrics:
        metrics.take(row("t000", "complete", steps=2, loss=1.0))
    parent, runs = children(client, live_sweep)
    assert (parent.info.status, runs["t000"].info.status) == ("FINISHED", "FINISHED")
    assert runs["t000"].info.run_id == first
    assert history(client, runs["t000"], "train/loss") == [(1, 2.999), (2, 2.998)]


DRIVER = """
import json, sys, time
from pathlib import Path
from qlora_core.registry.live_metrics import LiveMetrics, LiveSweep
settings, row, seconds = json.loads(sys.argv[1])
paths = {name: Path(settings.pop(name)) for name in ("work_dir", "trials_dir")}
with LiveMetrics(LiveSweep(**settings, **paths), send_every_s=0.02, last_words_s=100.0) as metrics:
    metrics.take(row)
    time.sleep(seconds)
"""


def test_a_driver_killed_while_it_sends_leaves_no_gap_and_repeats_no_point(
    client: MlflowClient, experiment_id: str, live_sweep: LiveSweep, diaries: Diaries
) -> None:
    diaries.add("t000", *(step_line("t000", step) for step in range(1, 6001)))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(live_sweep).items()}

    def driver(state: dict[str, Any], seconds: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps([settings, state, seconds])])

    def stored() -> int:
        runs = client.search_runs([experiment_id], f"tags.`qlora.run_key` = '{live_sweep.sweep_key}/t000'")
        return len(client.get_metric_history(runs[0].info.run_id, "train/loss")) if runs else 0

    process = driver(row("t000"), 60.0)
    try:
        wait_until(lambda: stored() > 300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert 300 < stored() < 6000, "killed too late: everything had been sent"
    finished = {**row("t000", "complete", loss=1.0), "steps": 6000}
    assert driver(finished, 0.0).wait(timeout=120) == 0
    parent, runs = children(client, live_sweep)
    assert (parent.info.status, runs["t000"].info.status) == ("FINISHED", "FINISHED")
    for name in STEP_METRICS:
        assert [step for step, _ in history(client, runs["t000"], f"train/{name}")] == list(range(1, 6001))


class Server:
    """A real MLflow server on loopback over a SQLite file, which can be killed and started again."""

    def __init__(self, database: Path, artifacts: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        keeping = ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(artifacts)]
        self._arguments = [*place, *keeping]
        self._log = database.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *self._arguments],
                start_new_session=True,
                stdout=stream,
                stderr=stream,
            )

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def wait_for(self) -> MlflowClient:
        def answers() -> bool:
            assert self.process is not None and self.process.poll() is None, self._log.read_text()[-2000:]
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until(answers, timeout_s=SERVER_START_S)
        return connect(self.uri)


@pytest.fixture
def server(client: MlflowClient, work_dir: Path, tmp_path: Path) -> Iterator[Server]:
    # A copy with its tables made, for making them takes longest.
    shutil.copyfile(work_dir / "mlflow.db", tmp_path / "server.db")
    made = Server(tmp_path / "server.db", tmp_path / "artifacts")
    yield made
    made.kill()


@pytest.mark.timeout(600)  # two starts of a server and two outages; how long they take is the machine's affair
def test_a_server_that_is_down_at_first_and_killed_later_gets_every_point_once_and_stops_nothing(
    server: Server,
    live_sweep: LiveSweep,
    diaries: Diaries,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sweep = LiveSweep(**{**vars(live_sweep), "tracking_uri": server.uri, "experiment": "over http"})
    takes_s: list[float] = []
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.wait(0.05):
            step += 1
            diaries.add("t000", step_line("t000", step))

    trainer = threading.Thread(target=train)
    with LiveMetrics(sweep, send_every_s=0.1, last_words_s=60.0) as metrics:
        trainer.start()

        def told() -> bool:
            before = time.monotonic()
            metrics.take(row("t000"))
            takes_s.append(time.monotonic() - before)
            return "training goes on without MLflow" in caplog.text

        def arrived() -> int:
            metrics.take(row("t000"))
            experiment = client.get_experiment_by_name("over http")
            runs = client.search_runs([experiment.experiment_id], "attributes.run_name = 't000'") if experiment else []
            return len(client.get_metric_history(runs[0].info.run_id, "train/loss")) if runs else 0

        wait_until(told)
        server.start()
        client = server.wait_for()
        wait_until(lambda: arrived() > 20, timeout_s=SERVER_START_S)
        caplog.clear()  # before the kill: what is told of it may be told before the kill returns
        server.kill()
        wait_until(told)
        server.start()
        client = server.wait_for()
        before = arrived()
        wait_until(lambda: arrived() > before, timeout_s=SERVER_START_S)
        stop.set()
        trainer.join()
        metrics.take(row("t000", "complete", steps=9, loss=1.0))
    # A busy machine may hold up a few of the calls; one that waited for MLflow would hold up all of them.
    assert sorted(takes_s)[int(0.95 * len(takes_s))] < 0.1, "whoever trains waited for MLflow"
    assert max(takes_s) < 5.0, "whoever trains waited for MLflow"
    steps = len((diaries.folder / "t000" / STEP_LOG).read_text().splitlines())
    parent, runs = children(client, sweep)
    assert (parent.info.status, runs["t000"].info.status) == ("FINISHED", "FINISHED")
    for name in STEP_METRICS:
        assert [step for step, _ in history(client, runs["t000"], f"train/{name}")] == list(range(1, steps + 1))


def test_registration_sends_what_a_sweep_without_mlflow_has_kept(
    live_sweep: LiveSweep, diaries: Diaries, client: MlflowClient, work_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diaries.add("t000", *(step_line("t000", step) for step in (1, 2)))
    with socket.socket() as unanswered:
        unanswered.bind(("127.0.0.1", 0))
        unanswered.listen()
        away = LiveSweep(
            **{**vars(live_sweep), "tracking_uri": f"http://127.0.0.1:{unanswered.getsockname()[1]}", "experiment": "x"}
        )
        started = time.monotonic()
        with LiveMetrics(away, send_every_s=0.01, last_words_s=0.5) as metrics:
            metrics.take(row("t000"))
            time.sleep(0.2)
        assert time.monotonic() - started < 5.0
    assert "registration sends what it lacks" in caplog.text
    experiment_id = find_or_create_experiment(client, live_sweep.experiment, work_dir)
    # Step 3 was trained on a machine whose diary is gone: the curve has it.
    swept = {"method": "grid", "best": "t000", "trials": [row("t000", "complete", steps=3, loss=1.5)]}
    record = SweepRecord("k", "late", {}, swept, DIGEST, {}, sweep_key=live_sweep.sweep_key, step_logs=diaries.folder)
    log_sweep(client, experiment_id, record)
    _, runs = children(client, live_sweep)
    assert [step for step, _ in history(client, runs["t000"], "train/loss")] == [1, 2, 3]
    assert [step for step, _ in history(client, runs["t000"], "train/memory_bytes")] == [1, 2]
