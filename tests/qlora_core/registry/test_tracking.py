"""A sweep in MLflow: nested runs, their states and figures, and that a retry adds nothing."""

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from qlora_core.registry.tracking import SweepRecord, log_sweep

DIGEST = "0123456789abcdef" * 4


def record(run_key: str, sweep: dict[str, Any], report: Path) -> SweepRecord:
    report.write_text("<html></html>")
    config = {"train": {"lora_rank": 8}}
    return SweepRecord(
        run_key, "a sweep", config, sweep, DIGEST, {"base_model": "demo"}, {"heldout/gain": 0.5}, [report]
    )


def test_sweep_becomes_a_parent_with_nested_trials(
    client: MlflowClient, experiment_id: str, sweep: dict[str, Any], tmp_path: Path
) -> None:
    parent_id = log_sweep(client, experiment_id, record("nested", sweep, tmp_path / "report.html"))
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["heldout/gain"] == 0.5
    assert parent.data.metrics["best_loss"] == 1.5
    assert {file.path for file in client.list_artifacts(parent_id)} == {"config.json", "report.html"}
    config = json.loads(Path(client.download_artifacts(parent_id, "config.json", str(tmp_path))).read_text())
    assert config == {"train": {"lora_rank": 8}}

    runs = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'")
    by_name = {run.info.run_name: run for run in runs}
    assert {name: run.info.status for name, run in by_name.items()} == {
        "t000": "FINISHED",
        "t001": "KILLED",
        "t002": "FAILED",
    }
    best = by_name["t000"]
    assert best.data.params["lora_rank"] == "8"
    assert best.data.tags["data_digest"] == DIGEST
    assert best.inputs is not None
    assert best.inputs.dataset_inputs[0].dataset.digest == DIGEST[:36]
    history = client.get_metric_history(best.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.9), (2, 1.8), (3, 1.7)]
    assert by_name["t002"].data.tags["error"] == "loss is NaN"
    assert "loss" not in by_name["t002"].data.metrics


def test_logging_the_same_key_again_adds_nothing(
    client: MlflowClient, experiment_id: str, sweep: dict[str, Any], tmp_path: Path
) -> None:
    again = record("idempotent", sweep, tmp_path / "report.html")
    first = log_sweep(client, experiment_id, again)
    assert log_sweep(client, experiment_id, again) == first
    assert len(client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{first}'")) == 3


def test_half_logged_sweep_is_completed(
    client: MlflowClient, experiment_id: str, sweep: dict[str, Any], tmp_path: Path
) -> None:
    tags = {"qlora.run_key": "half"}
    parent = client.create_run(experiment_id, tags=tags).info.run_id
    child = {"qlora.run_key": "half/t000", "mlflow.parentRunId": parent}
    client.create_run(experiment_id, tags=child)
    assert log_sweep(client, experiment_id, record("half", sweep, tmp_path / "report.html")) == parent
    runs = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(str(run.info.run_name) for run in runs) == ["t000", "t001", "t002"]
