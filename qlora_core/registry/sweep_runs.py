"""A sweep's runs in MLflow: one parent, one nested run per trial, found again by the sweep's key or made.

Knows what makes a run findable and readable; nothing of points and states.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_core.registry.connection import registry_errors
from qlora_core.registry.logged_run import LoggedRun, log_params, set_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_KEY_TAG = "qlora.run_key"
SWEEP_KEY_TAG = "qlora.sweep_key"
DATASET_DIGEST_LENGTH = 36


class SweepRuns:
    """The runs of the sweep `sweep_key`. `tags` go on every run; `data_digest` is the curated data's."""

    def __init__(
        self, client: "MlflowClient", experiment_id: str, sweep_key: str, tags: Mapping[str, str], data_digest: str
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._sweep_key = sweep_key
        self._tags = {**tags, "data_digest": data_digest}
        self._data_digest = data_digest

    def parent(self, name: str) -> str:
        """The id of the run the trials are nested in, under way: the one of before, or a new one.

        Raises RegistryError.
        """
        with registry_errors(f"opening the run of sweep {self._sweep_key[:16]}"):
            run = only_run(self._client, self._experiment_id, SWEEP_KEY_TAG, self._sweep_key)
            if run is None:
                tags = {**self._tags, SWEEP_KEY_TAG: self._sweep_key}
                run = self._client.create_run(self._experiment_id, run_name=name, tags=tags)
            elif run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)

    def trial(
        self, parent_id: str, trial: str, params: Mapping[str, Any], start_ms: int, role: str = "trial"
    ) -> LoggedRun:
        """The run of a trial, by its id, with its settings; made with `start_ms` as its start where there is none.

        A run with other settings under the same key is left of a sweep that never came to its end, and is deleted.
        Raises RegistryError.
        """
        run_key = f"{self._sweep_key}/{trial}"
        with registry_errors(f"opening the run of trial {trial}"):
            run = only_run(self._client, self._experiment_id, RUN_KEY_TAG, run_key)
            if run is not None and not _agrees(run, params):
                self._client.delete_run(run.info.run_id)
                run = None
            tags = {**self._tags, RUN_KEY_TAG: run_key, "trial_role": role}
            if run is None:
                tags |= {"mlflow.parentRunId": parent_id, "trial_state": "waiting"}
                run = self._client.create_run(self._experiment_id, start_time=start_ms, run_name=trial, tags=tags)
            elif run.info.run_name != trial:
                self._client.update_run(run.info.run_id, name=trial)
            run_id = str(run.info.run_id)
            if not params.keys() <= run.data.params.keys():
                log_params(self._client, run_id, params)
            set_tags(self._client, run_id, {k: v for k, v in tags.items() if run.data.tags.get(k) != v})
            if run.inputs is None or not run.inputs.dataset_inputs:
                log_dataset(self._client, run_id, self._data_digest)
        return LoggedRun(self._client, run_id)


def only_run(client: "MlflowClient", experiment_id: str, tag: str, value: str) -> "Run | None":
    """The oldest run with the tag; None where there is none.

    Others are deleted: they were made twice because the server's answer to the first request was lost.
    """
    found = client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time ASC"])
    for spare in found[1:]:
        client.delete_run(spare.info.run_id)
    return found[0] if found else None


def log_dataset(client: "MlflowClient", run_id: str, data_digest: str) -> None:
    """Show the curated data as the run's input."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # MLflow's column is too short for a SHA-256; the run's tag data_digest holds all of it.
    dataset = Dataset("curated", data_digest[:DATASET_DIGEST_LENGTH], source_type="store", source=data_digest)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _agrees(run: "Run", params: Mapping[str, Any]) -> bool:
    return all(name in params and str(params[name]) == value for name, value in run.data.params.items())
