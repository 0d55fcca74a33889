"""Sweeps of toy trials on real Ray workers: deaths, failures, worker counts, and a cluster without room."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_core.config.compute import ComputeConfig
from qlora_core.errors import LeaseLostError, SweepError
from qlora_core.sweep.cluster import Cluster
from qlora_core.sweep.pool import Outcome
from qlora_core.sweep.ray_connection import ray_connection


def results(records: list[Any]) -> list[dict[str, Any]]:
    """Rows without what may differ between equal sweeps: time spent, deaths survived."""
    return [
        {name: value for name, value in record.row().items() if name not in ("seconds", "deaths")} for record in records
    ]


def steps_taken(work_dir: Path) -> list[str]:
    return (work_dir / "trials" / "steps.log").read_text().split("\n")[:-1]


def rate(row: Mapping[str, Any]) -> float:
    return row["params"]["learning_rate"]


@pytest.fixture(scope="session")
def undisturbed(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of the toy sweep on one worker, run twice over the same folder."""
    work_dir = tmp_path_factory.mktemp("undisturbed")
    rows = results(toy.toy_sweep(work_dir, workers=1))
    taken = steps_taken(work_dir)
    assert len(taken) == len(set(taken))
    assert results(toy.toy_sweep(work_dir, workers=1)) == rows
    assert steps_taken(work_dir) == taken, "a finished sweep was trained again"
    return rows


def test_halving_runs_four_trials_to_a_quarter_and_one_to_its_end(undisturbed: list[dict[str, Any]]) -> None:
    outcome = {rate(row): (row["state"], row["steps"]) for row in undisturbed}
    assert outcome == {
        0.1: ("pruned", 4),
        0.2: ("pruned", 4),
        0.3: ("pruned", 8),
        0.4: ("complete", 16),
        5.0: ("failed", 0),
    }
    best = next(row for row in undisturbed if row["state"] == "complete")
    assert [rung["step"] for rung in best["rungs"]] == [4, 8, 16]
    assert [entry["step"] for entry in best["curve"]] == list(range(1, 17))
    assert best["curve"][0]["grad_norm"] is None


def test_a_point_outside_the_train_section_is_a_failed_row(undisturbed: list[dict[str, Any]]) -> None:
    (refused,) = [row for row in undisturbed if rate(row) == 5.0]
    assert refused["state"] == "failed"
    assert "learning_rate: Input should be less than or equal to 1" in refused["error"]


def test_killed_workers_change_no_result(toy: ModuleType, tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    best, second = sorted((row for row in undisturbed if row["steps"] > 4), key=lambda row: -row["steps"])
    faults = {best["id"]: {"kill_at": 11}, second["id"]: {"kill_at": 3}}
    records = toy.toy_sweep(tmp_path, faults=faults)
    assert results(records) == undisturbed
    assert {record.id: record.deaths for record in records if record.deaths} == {best["id"]: 1, second["id"]: 1}
    taken = steps_taken(tmp_path)
    assert len(taken) == len(set(taken))


def test_failing_trials_are_rows_and_the_others_finish(
    toy: ModuleType, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    by_rate = {rate(row): row["id"] for row in undisturbed}
    faults = {
        by_rate[0.4]: {"raise_at": 2},
        by_rate[0.3]: {"kill_at": 3, "times": 99},
        by_rate[0.2]: {"nan_at": 4},
    }
    records = {rate(record.row()): record for record in toy.toy_sweep(tmp_path, faults=faults)}
    assert records[0.4].error == "TrainingError: the loss at step 2 is not finite"
    assert str(records[0.3].error).startswith("its worker died 2 times")
    assert records[0.2].error == "the validation loss at step 4 is nan"
    assert records[0.2].row()["loss"] is None
    assert [records[value].state for value in (0.1, 0.2, 0.3, 0.4, 5.0)] == ["complete", *["failed"] * 4]
    assert records[0.1].steps == 16


def test_trial_taken_over_by_another_machine_ends_the_sweep_and_no_trial_failed(
    toy: ModuleType, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    (best,) = [row["id"] for row in undisturbed if row["state"] == "complete"]
    with pytest.raises(LeaseLostError, match=f"trial {best} was taken over"):
        toy.toy_sweep(tmp_path, faults={best: {"lost_at": 7}})
    # Once it is ours again, it goes on as if nothing had happened.
    assert results(toy.toy_sweep(tmp_path)) == undisturbed


def test_no_room_for_a_worker_is_an_error_that_counts_the_room(toy: ModuleType, tmp_path: Path) -> None:
    arguments = {"trials_dir": str(tmp_path), "faults": {}, "step_seconds": 0.0}
    short = ComputeConfig(workers=1, worker_start_timeout_s=1.0)
    with Cluster(toy.ToyWorker, arguments, ComputeConfig(workers=2), most=2) as full:
        while len(full.idle()) < 2:
            full.wait(1.0)
        with (
            pytest.raises(SweepError, match=r"within 1 s; each needs 1 CPU, and the cluster has 0 GPUs and \d+ CPUs"),
            Cluster(toy.ToyWorker, arguments, short, most=1) as starved,
        ):
            while True:
                starved.wait(0.5)


def test_a_worker_that_cannot_load_ends_the_sweep_with_its_reason(toy: ModuleType, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    arguments = {"trials_dir": str(blocked), "faults": {}, "step_seconds": 0.0}
    with (
        pytest.raises(SweepError, match=r"a worker cannot start: .*FileExistsError"),
        Cluster(toy.ToyWorker, arguments, ComputeConfig(workers=1), most=1) as cluster,
    ):
        while not cluster.idle():
            cluster.wait(1.0)


def test_an_address_where_nothing_answers_is_refused_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(SweepError, match=f"compute.ray_address '{address}'"), ray_connection(address, None):
        pass


def test_a_machine_without_gpus_is_refused_where_they_are_required(toy: ModuleType, tmp_path: Path) -> None:
    arguments = {"trials_dir": str(tmp_path), "faults": {}, "step_seconds": 0.0}
    with (
        pytest.raises(SweepError, match=r"compute\.gpus is required, and this machine has 0 GPUs"),
        Cluster(toy.ToyWorker, arguments, ComputeConfig(gpus="required"), most=1),
    ):
        pass


def test_a_drained_worker_checkpoints_and_its_trial_goes_on_elsewhere(toy: ModuleType, tmp_path: Path) -> None:
    arguments = {"trials_dir": str(tmp_path), "faults": {}, "step_seconds": 0.2}
    order = {"id": "t000", "params": {"learning_rate": 0.1}, "rungs": []}
    with Cluster(toy.ToyWorker, arguments, ComputeConfig(workers=1), most=1) as cluster:
        while not cluster.idle():
            cluster.wait(1.0)
        (first,) = cluster.idle()
        cluster.submit(first, "pack", "run", [order], [50])
        cluster.wait(1.0)
        cluster.drain(first)
        outcomes: list[Outcome] = []
        while not outcomes:
            outcomes = cluster.wait(1.0)
        assert outcomes[0].result[0]["interrupted"] and not outcomes[0].died
        while not cluster.idle():
            cluster.wait(1.0)
        (second,) = cluster.idle()
        assert second != first
        cluster.submit(second, "pack", "run", [order], [outcomes[0].result[0]["step"] + 1])
        while not (outcomes := cluster.wait(1.0)):
            pass
        assert outcomes[0].result[0]["step"] >= 2
        taken = (tmp_path / "steps.log").read_text().split("\n")[:-1]
        assert len(taken) == len(set(taken))


def test_idle_workers_beyond_the_work_end_and_come_back(toy: ModuleType, tmp_path: Path) -> None:
    arguments = {"trials_dir": str(tmp_path), "faults": {}, "step_seconds": 0.0}
    with Cluster(toy.ToyWorker, arguments, ComputeConfig(workers=2, idle_worker_s=1.0), most=2) as cluster:
        while len(cluster.idle()) < 2:
            cluster.wait(1.0)
        cluster.expect(1)
        deadline = time.monotonic() + 60
        while len(cluster.idle()) > 1 and time.monotonic() < deadline:
            cluster.wait(0.5)
            time.sleep(0.2)
        # Which of the two has been idle for longer, and so ends, depends on which of them had loaded first.
        (kept,) = cluster.idle()
        assert kept in ("worker-0", "worker-1")
        cluster.expect(2)
        while len(cluster.idle()) < 2 and time.monotonic() < deadline:
            cluster.wait(0.5)
            time.sleep(0.1)
        assert cluster.idle() == [kept, "worker-2"]


def test_a_cluster_beyond_this_machine_needs_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SweepError, match="there is no token"), ray_connection("192.0.2.1:6379", None):
        pass
