"""One MLflow run that is written point by point, each point once, whoever wrote the others and when.

What is there is read back before the first write, so that a killed writer, another machine or a lost answer of the
server repeats nothing. Knows the lines of the step diary and the rows of `sweep.json`; nothing of how runs are found.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_core.registry.connection import registry_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

Point = tuple[str, float, int, int]
"""Name, value, time in ms, step."""

STATUS = {"waiting": "RUNNING", "complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
STEP_METRICS = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "memory_bytes")
PACK_METRICS = ("tokens_per_s", "process_memory_bytes", "trials")
METRICS_PER_BATCH = 1000
"""The most that MLflow takes in one request."""

_RATE = "train/learning_rate"
_MILLISECONDS = 1000


class LoggedRun:
    """A run's points. A step is told by its number and its learning rate.

    A step trained again after a worker died has the same rate, and is the same point; after a roll-back it has half
    the rate, and is another one, later in time.
    """

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._moments: dict[int, int] = {}
        self._logged: dict[str, set[int]] = {}

    @cached_property
    def _steps(self) -> set[tuple[int, float]]:
        history = self._client.get_metric_history(self.run_id, _RATE)
        self._moments.update({point.step: point.timestamp for point in history})
        return {(point.step, point.value) for point in history}

    def log_steps(self, lines: Iterable[Mapping[str, Any]]) -> int:
        """Log the lines of a step diary that are not there yet; returns how many those were.

        A line needs `time` (s), `step` and `learning_rate`. Lines go whole, in as few requests as MLflow allows; what
        was sent before an error is not sent again. Raises RegistryError.
        """
        with registry_errors("logging steps"):
            fresh: dict[tuple[int, float], Mapping[str, Any]] = {}
            for line in lines:
                if (key := _key(line)) not in self._steps:
                    fresh.setdefault(key, line)
            waiting, size = list(fresh.items()), METRICS_PER_BATCH // len(STEP_METRICS)
            for first in range(0, len(waiting), size):
                some = waiting[first : first + size]
                self._send([point for _, line in some for point in _step_points(line)])
                self._steps.update(key for key, _ in some)
                self._moments.update({step: milliseconds(line["time"]) for (step, _), line in some})
        return len(fresh)

    def log_packs(self, worker: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Log what a worker wrote of its packs, as `pack/<worker>/<figure>` over the number of the line."""
        prefix = f"pack/{worker}"
        with registry_errors("logging packs"):
            known = self._known(f"{prefix}/trials")
            fresh = [line for line in lines if line["line"] not in known]
            size = METRICS_PER_BATCH // len(PACK_METRICS)
            for first in range(0, len(fresh), size):
                some = fresh[first : first + size]
                self._send([point for line in some for point in _pack_points(prefix, line)])
                known.update(line["line"] for line in some)

    def log_rungs(self, rungs: Sequence[Mapping[str, Any]], fallback_ms: int) -> None:
        """Log validation losses that are not there yet, at the moment of their step where that is known."""
        with registry_errors("logging rungs"):
            _ = self._steps  # so that the moments are known
            for name in ("loss", "reward_accuracy"):
                known = self._known(f"validation/{name}")
                fresh = {rung["step"]: rung[name] for rung in rungs if rung.get(name) is not None}
                fresh = {step: value for step, value in fresh.items() if step not in known}
                points = [
                    (f"validation/{name}", float(value), self._moments.get(step, fallback_ms), int(step))
                    for step, value in fresh.items()
                ]
                self._send(points)
                known.update(fresh)

    def finish(self, row: Mapping[str, Any], end_ms: int) -> None:
        """Log a finished trial's outcome (`loss`, `steps`, `seconds`), once, and end the run as its state says."""
        with registry_errors(f"ending the run of trial {row['id']}"):
            run = self._client.get_run(self.run_id)
            step = int(row["steps"])
            moment = self._moments.get(step, end_ms)
            figures = {"steps": step, "seconds": row["seconds"], "loss": row.get("loss")}
            self._send(
                [
                    (name, float(value), moment, step)
                    for name, value in figures.items()
                    if value is not None and name not in run.data.metrics
                ]
            )
            tags = {"trial_state": row["state"], **({"error": str(row["error"])} if row.get("error") else {})}
            set_tags(self._client, self.run_id, {k: v for k, v in tags.items() if run.data.tags.get(k) != v})
            if run.info.status != STATUS[row["state"]]:
                self._client.set_terminated(self.run_id, STATUS[row["state"]], end_time=end_ms)

    def reopen(self) -> None:
        """Show the run as under way. Raises RegistryError."""
        with registry_errors("opening a run again"):
            if self._client.get_run(self.run_id).info.status != "RUNNING":
                self._client.update_run(self.run_id, status="RUNNING")

    def end(self, status: str) -> None:
        """End the run now: FINISHED, FAILED or KILLED. Raises RegistryError."""
        with registry_errors("ending a run"):
            self._client.set_terminated(self.run_id, status)

    def _known(self, name: str) -> set[int]:
        if name not in self._logged:
            self._logged[name] = {point.step for point in self._client.get_metric_history(self.run_id, name)}
        return self._logged[name]

    def _send(self, points: Sequence[Point]) -> None:
        log_points(self._client, self.run_id, points)


def log_points(client: "MlflowClient", run_id: str, points: Sequence[Point]) -> None:
    """Send points in batches; none: no request. MLflow's databases keep a point that is sent twice once."""
    from mlflow.entities import Metric

    metrics: list[Metric] = [Metric(*point) for point in points]
    for first in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_BATCH])


def log_params(client: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    """Set params in one request; one that is there already must be the same."""
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in sorted(params.items())])


def set_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags in one request; none: no request."""
    from mlflow.entities import RunTag

    if tags:
        client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in sorted(tags.items())])


def now_ms() -> int:
    """The time as MLflow counts it."""
    return int(time.time() * _MILLISECONDS)


def _key(line: Mapping[str, Any]) -> tuple[int, float]:
    return int(line["step"]), float(line["learning_rate"])


def milliseconds(seconds: float) -> int:
    """A diary's time as MLflow counts it."""
    return round(seconds * _MILLISECONDS)


def _step_points(line: Mapping[str, Any]) -> Iterator[Point]:
    for name in STEP_METRICS:
        if line.get(name) is not None:
            yield f"train/{name}", float(line[name]), milliseconds(line["time"]), int(line["step"])


def _pack_points(prefix: str, line: Mapping[str, Any]) -> Iterator[Point]:
    for name in PACK_METRICS:
        if line.get(name) is not None:
            yield f"{prefix}/{name}", float(line[name]), milliseconds(line["time"]), int(line["line"])
