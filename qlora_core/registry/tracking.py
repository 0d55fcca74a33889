"""A sweep as MLflow runs: one parent, one nested run per trial. Knows the shape of `sweep.json` and no model or alias.

Called by the driver alone, once training is over: MLflow's SQLite file takes one writer.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.registry.connection import registry_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY_TAG = "qlora.run_key"
DATASET_DIGEST_LENGTH = 36
_METRICS_PER_BATCH = 1000
_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
_MILLISECONDS = 1000


@dataclass(frozen=True)
class SweepRecord:
    """What is logged for one sweep.

    `run_key` identifies it: logging the same key again adds nothing. `tags` go on the parent and every trial. `metrics`
    (name to value) and `files` (kept under their own names) belong to the parent.
    """

    run_key: str
    name: str
    config: Mapping[str, Any]
    sweep: Mapping[str, Any]
    data_digest: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Sequence[Path] = ()


def log_sweep(client: "MlflowClient", experiment_id: str, record: SweepRecord) -> str:
    """Log a sweep and its trials; returns the parent's run id, the same one each time for one `run_key`.

    A run left unfinished by a killed process is taken up again: the parent is completed, a half-written trial is
    replaced. Raises RegistryError.
    """
    with registry_errors(f"logging sweep {record.run_key}"):
        parent = _find(client, experiment_id, record.run_key)
        if parent is not None and parent.info.status == "FINISHED":
            return str(parent.info.run_id)
        if parent is None:
            tags = {**record.tags, RUN_KEY_TAG: record.run_key, "data_digest": record.data_digest}
            parent = client.create_run(experiment_id, run_name=record.name, tags=tags)
        parent_id = str(parent.info.run_id)
        for trial in record.sweep["trials"]:
            _log_trial(client, experiment_id, parent_id, trial, record)
        _log_parent(client, parent_id, record)
        client.set_terminated(parent_id, "FINISHED")
    return parent_id


def _find(client: "MlflowClient", experiment_id: str, run_key: str) -> Any:
    runs = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{run_key}'", max_results=1)
    return runs[0] if runs else None


def _log_parent(client: "MlflowClient", run_id: str, record: SweepRecord) -> None:
    sweep = record.sweep
    summary = dict(record.metrics)
    losses = [trial["loss"] for trial in sweep["trials"] if trial["id"] == sweep["best"] and trial["loss"] is not None]
    summary |= {"trials": float(len(sweep["trials"])), **({"best_loss": losses[0]} if losses else {})}
    now = int(time.time() * _MILLISECONDS)
    _log_metrics(client, run_id, [(name, value, now, 0) for name, value in sorted(summary.items())])
    _log_params(client, run_id, {"sweep.method": sweep["method"], "sweep.best": sweep["best"]})
    _log_dataset(client, run_id, record.data_digest)
    client.log_dict(run_id, dict(record.config), "config.json")
    for path in record.files:
        client.log_artifact(run_id, str(path))


def _log_trial(
    client: "MlflowClient", experiment_id: str, parent_id: str, trial: Mapping[str, Any], record: SweepRecord
) -> None:
    run_key = f"{record.run_key}/{trial['id']}"
    existing = _find(client, experiment_id, run_key)
    if existing is not None and existing.info.status != "RUNNING":
        return
    if existing is not None:
        client.delete_run(existing.info.run_id)
    # The trial itself ended a while ago; its run gets its true length, ending now.
    end = int(time.time() * _MILLISECONDS)
    start = end - int(trial["seconds"] * _MILLISECONDS)
    tags = {
        **record.tags,
        RUN_KEY_TAG: run_key,
        "mlflow.parentRunId": parent_id,
        "trial_state": trial["state"],
        "data_digest": record.data_digest,
    }
    if trial.get("error"):
        tags["error"] = str(trial["error"])
    run = client.create_run(experiment_id, start_time=start, tags=tags, run_name=trial["id"])
    run_id = str(run.info.run_id)
    _log_params(client, run_id, trial["params"])
    _log_metrics(client, run_id, list(_trial_metrics(trial, start, end)))
    _log_dataset(client, run_id, record.data_digest)
    client.set_terminated(run_id, _STATUS[trial["state"]], end_time=end)


def _trial_metrics(trial: Mapping[str, Any], start: int, end: int) -> Iterator[tuple[str, float, int, int]]:
    """(name, value, time in ms, step) of a trial's curve, rungs and outcome; points without a value are left out."""
    steps = max(int(trial["steps"]), 1)
    for name, points, keys in (
        ("train", trial.get("curve", ()), ("loss", "learning_rate", "grad_norm", "tokens")),
        ("validation", trial.get("rungs", ()), ("loss",)),
    ):
        for point in points:
            moment = start + (end - start) * min(int(point["step"]), steps) // steps
            for key in keys:
                if point.get(key) is not None:
                    yield f"{name}/{key}", float(point[key]), moment, int(point["step"])
    if trial.get("loss") is not None:
        yield "loss", float(trial["loss"]), end, int(trial["steps"])
    yield "steps", float(trial["steps"]), end, int(trial["steps"])
    yield "seconds", float(trial["seconds"]), end, int(trial["steps"])


def _log_metrics(client: "MlflowClient", run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    metrics: list[Metric] = [Metric(name, value, moment, step) for name, value, moment, step in points]
    for first in range(0, len(metrics), _METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + _METRICS_PER_BATCH])


def _log_params(client: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in sorted(params.items())])


def _log_dataset(client: "MlflowClient", run_id: str, data_digest: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # MLflow's column is too short for a SHA-256; the run's tag data_digest holds all of it.
    dataset = Dataset("curated", data_digest[:DATASET_DIGEST_LENGTH], source_type="store", source=data_digest)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
