"""A sweep as MLflow runs: one parent, one nested run per trial. Knows the shape of `sweep.json` and no model or alias.

Called by the driver alone, once training is over: MLflow's SQLite file takes one writer. What was logged while the
sweep trained (`live_metrics`) is taken up and completed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.registry.connection import registry_errors
from qlora_core.registry.logged_run import LoggedRun, log_params, log_points, now_ms, set_tags
from qlora_core.registry.sweep_runs import RUN_KEY_TAG, SWEEP_KEY_TAG, SweepRuns, log_dataset, only_run
from qlora_core.training.step_tail import StepTail

if TYPE_CHECKING:
    from mlflow import MlflowClient

SWEEP_RUN_TAG = "qlora.sweep_run"
"""On the run of a candidate whose sweep stands under another candidate's run already: that run's id."""

_MILLISECONDS = 1000


@dataclass(frozen=True)
class SweepRecord:
    """What is logged for one sweep.

    `run_key` identifies it: logging the same key again adds nothing. `tags` go on the parent and every trial. `metrics`
    (name to value) and `files` (kept under their own names) belong to the parent. `sweep_key` is what the sweep was
    logged under while it trained; None: it was not. `step_logs` is the folder of its step diaries, laid out
    as the sweep's trials are; None, or no such folder: what `sweep` has of the curves is all there is.
    """

    run_key: str
    name: str
    config: Mapping[str, Any]
    sweep: Mapping[str, Any]
    data_digest: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Sequence[Path] = ()
    sweep_key: str | None = None
    step_logs: Path | None = None


def log_sweep(client: "MlflowClient", experiment_id: str, record: SweepRecord) -> str:
    """Log a sweep and its trials; returns the parent's run id, the same one each time for one `run_key`.

    A run left unfinished by a killed process is taken up again: the parent is completed, and a trial gets the points
    it lacks. Raises RegistryError.
    """
    with registry_errors(f"logging sweep {record.run_key}"):
        parent = only_run(client, experiment_id, RUN_KEY_TAG, record.run_key)
        if parent is not None and parent.info.status == "FINISHED":
            return str(parent.info.run_id)
        parent_id = _open_parent(client, experiment_id, record) if parent is None else str(parent.info.run_id)
        key = record.sweep_key or record.run_key
        runs = SweepRuns(client, experiment_id, key, record.tags, record.data_digest)
        nested_in = client.get_run(parent_id).data.tags.get(SWEEP_RUN_TAG, parent_id)
        for trial in record.sweep["trials"]:
            _log_trial(runs, nested_in, trial, record.step_logs)
        _log_packs(client, nested_in, record.step_logs)
        _log_parent(client, parent_id, record)
        client.set_terminated(parent_id, "FINISHED")
    return parent_id


def _open_parent(client: "MlflowClient", experiment_id: str, record: SweepRecord) -> str:
    """A run for the candidate: the sweep's own from while it trained, unless another candidate has that one."""
    tags = {**record.tags, RUN_KEY_TAG: record.run_key, "data_digest": record.data_digest}
    if record.sweep_key is not None:
        live = only_run(client, experiment_id, SWEEP_KEY_TAG, record.sweep_key)
        if live is not None and RUN_KEY_TAG not in live.data.tags:
            run_id = str(live.info.run_id)
            client.update_run(run_id, status="RUNNING", name=record.name)
            set_tags(client, run_id, tags)
            return run_id
        tags |= {SWEEP_KEY_TAG: record.sweep_key} if live is None else {SWEEP_RUN_TAG: str(live.info.run_id)}
    return str(client.create_run(experiment_id, run_name=record.name, tags=tags).info.run_id)


def _log_parent(client: "MlflowClient", run_id: str, record: SweepRecord) -> None:
    sweep = record.sweep
    summary = dict(record.metrics)
    losses = [trial["loss"] for trial in sweep["trials"] if trial["id"] == sweep["best"] and trial["loss"] is not None]
    summary |= {"trials": float(len(sweep["trials"])), **({"best_loss": losses[0]} if losses else {})}
    now = now_ms()
    log_points(client, run_id, [(name, value, now, 0) for name, value in sorted(summary.items())])
    log_params(client, run_id, {"sweep.method": sweep["method"], "sweep.best": sweep["best"]})
    log_dataset(client, run_id, record.data_digest)
    client.log_dict(run_id, dict(record.config), "config.json")
    for path in record.files:
        client.log_artifact(run_id, str(path))


def _log_trial(runs: SweepRuns, parent_id: str, trial: Mapping[str, Any], step_logs: Path | None) -> None:
    # The trial itself ended a while ago; where nobody saw it, its run gets its true length, ending now.
    end = now_ms()
    start = end - int(trial["seconds"] * _MILLISECONDS)
    run = runs.trial(parent_id, trial["id"], trial["params"], start, trial.get("role", "trial"))
    if step_logs is not None:
        tail = StepTail(step_logs)
        while lines := tail.steps(trial["id"]):
            run.log_steps(lines)
    run.log_steps(_curve(trial, start, end))
    run.log_rungs(trial.get("rungs", ()), end)
    run.finish(trial, end)


def _log_packs(client: "MlflowClient", run_id: str, step_logs: Path | None) -> None:
    if step_logs is None:
        return
    run, tail = LoggedRun(client, run_id), StepTail(step_logs)
    while packs := tail.packs():
        for worker, lines in packs.items():
            run.log_packs(worker, lines)


def _curve(trial: Mapping[str, Any], start: int, end: int) -> Iterator[dict[str, Any]]:
    """The curve's entries as lines of a step diary, their times spread over the trial's."""
    steps = max(int(trial["steps"]), 1)
    for entry in trial.get("curve", ()):
        moment = start + (end - start) * min(int(entry["step"]), steps) // steps
        yield {**entry, "time": moment / _MILLISECONDS}
