"""A sweep in MLflow while it trains: a thread of the driver sends what the workers write into their step diaries.

The diaries are the spool: an MLflow that is away costs no point and no time of the training, and gets everything once
it is back, at the latest when the sweep's result is registered. Each point arrives once, whatever is killed in between.
Knows the rows of `sweep.json` and the diaries; nothing of Ray, of workers or of how a trial trains.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qlora_core.errors import RegistryError
from qlora_core.registry.connection import connect, find_or_create_experiment, registry_lock
from qlora_core.registry.logged_run import LoggedRun, milliseconds, now_ms
from qlora_core.registry.sweep_runs import SweepRuns
from qlora_core.training.step_tail import StepTail

if TYPE_CHECKING:
    from mlflow import MlflowClient

SEND_EVERY_S = 5.0
LAST_WORDS_S = 20.0
"""How long the end of a sweep waits for what is not sent yet."""

_QUIET_PER_WAIT = 3.0
"""After a failure MLflow is left alone so many times as long as that took."""

_LOCK_WAIT_S = 30.0
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveSweep:
    """Where a sweep is logged to, and as what.

    `sweep_key` identifies it: going on with the same key goes on in the same runs. `name` is the parent run's, `tags`
    go on every run. `work_dir` is the pipeline's, for the artifacts of a SQLite registry; `trials_dir` has the diaries.
    """

    tracking_uri: str
    experiment: str
    work_dir: Path
    trials_dir: Path
    sweep_key: str
    name: str
    tags: Mapping[str, str]
    data_digest: str


@dataclass
class _Live:
    """What the thread has of a trial: its run, once it is there, and what is read but not known to be sent."""

    run: LoggedRun | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    told: Mapping[str, Any] | None = None


class LiveMetrics:
    """Logs the trials that `take` is told of, from entering until leaving; a context manager.

    Neither `take` nor a failing MLflow raises or waits; leaving waits `last_words_s` at most. A failure is told once,
    and again after MLflow had been back.
    """

    def __init__(
        self, sweep: LiveSweep, *, send_every_s: float = SEND_EVERY_S, last_words_s: float = LAST_WORDS_S
    ) -> None:
        self._sweep = sweep
        self._send_every_s = send_every_s
        self._last_words_s = last_words_s
        self._tail = StepTail(sweep.trials_dir)
        self._rows: dict[str, dict[str, Any]] = {}
        self._live: dict[str, _Live] = {}
        self._packs: dict[str, list[dict[str, Any]]] = {}
        self._ending = threading.Event()
        self._abandoned = threading.Event()
        self._status = "FINISHED"
        self._told = False
        self._client: MlflowClient | None = None
        self._runs: SweepRuns | None = None
        self._parent: LoggedRun | None = None
        # A daemon: an MLflow that does not answer must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="live-metrics", daemon=True)

    def __enter__(self) -> "LiveMetrics":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._ending.set()
        self._thread.join(self._last_words_s)
        if self._thread.is_alive():
            self._abandoned.set()
            _LOGGER.warning("MLflow has not got all of the sweep's metrics yet; registration sends what it lacks")

    def take(self, row: Mapping[str, Any]) -> None:
        """A trial changed: its row as in `sweep.json`."""
        self._rows[row["id"]] = {**row, "rungs": list(row["rungs"]), "curve": ()}

    def _work(self) -> None:
        wait_s = self._send_every_s
        ended = False
        while not ended:
            ended = self._ending.wait(wait_s)
            started = time.monotonic()
            try:
                self._send_all(ended=ended)
                wait_s = self._send_every_s
            except Exception as error:  # noqa: BLE001 - whatever MLflow and its plugins raise, training goes on
                wait_s = max(self._send_every_s, _QUIET_PER_WAIT * (time.monotonic() - started))
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            _LOGGER.warning(
                "training goes on without MLflow, which gets its metrics when it is back: %s",
                error if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}",
            )

    def _send_all(self, *, ended: bool) -> None:
        begun = any(self._tail.has_steps(trial) for trial in list(self._rows))
        if not self._rows or not (begun or ended):
            return  # importing MLflow would only slow down workers that are starting
        parent = self._open()
        for trial, row in list(self._rows.items()):
            live = self._live.setdefault(trial, _Live())
            live.lines = live.lines or self._tail.steps(trial)
            while live.lines or row is not live.told:
                with self._turn():
                    self._send(parent, row, live)
                # A trial may write faster than MLflow answers, and the others are to have their turn
                live.lines = self._tail.steps(trial) if ended else []
        self._packs = self._packs or self._tail.packs()
        while self._packs:
            with self._turn():
                for worker, lines in self._packs.items():
                    parent.log_packs(worker, lines)
            self._packs = self._tail.packs() if ended else {}
        if ended:
            with self._turn():
                self._end(parent)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """A few requests, with the registry alone; refused once nobody waits for them."""
        if self._abandoned.is_set():
            raise RegistryError("the sweep has ended before all of its metrics were sent")
        with registry_lock(self._sweep.tracking_uri, timeout_s=_LOCK_WAIT_S):
            yield
        self._told = False

    def _open(self) -> LoggedRun:
        if self._parent is None or self._runs is None:
            client, sweep = self._connected(), self._sweep
            experiment_id = find_or_create_experiment(client, sweep.experiment, sweep.work_dir)
            self._runs = SweepRuns(client, experiment_id, sweep.sweep_key, sweep.tags, sweep.data_digest)
            with self._turn():
                self._parent = LoggedRun(client, self._runs.parent(sweep.name))
        return self._parent

    def _connected(self) -> "MlflowClient":
        if self._client is None:
            self._client = connect(self._sweep.tracking_uri)
        return self._client

    def _send(self, parent: LoggedRun, row: Mapping[str, Any], live: _Live) -> None:
        if live.run is None and self._runs is not None:
            begun = milliseconds(live.lines[0]["time"]) if live.lines else now_ms()
            run = self._runs.trial(parent.run_id, row["id"], row["params"], begun, row.get("role", "trial"))
            if row["state"] == "waiting":
                run.reopen()
            live.run = run
        if live.run is None:
            return
        live.run.log_steps(live.lines)
        if row is not live.told:
            live.run.log_rungs(row["rungs"], now_ms())
            if row["state"] != "waiting":
                live.run.finish(row, now_ms())
            live.told = row

    def _end(self, parent: LoggedRun) -> None:
        """A trial that was not finished goes on under the same run, if it ever does."""
        for trial, live in self._live.items():
            if live.run is not None and self._rows[trial]["state"] == "waiting":
                live.run.end("KILLED")
        parent.end(self._status)
