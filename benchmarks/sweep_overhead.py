"""What a sweep costs beside its training: 1,000 trials whose work is nothing, on two real Ray workers.

Everything else is real: the study in SQLite, the driver, Ray's calls. Start-up of Ray and of the workers is reported
apart and is part of the whole.
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.sweep import FloatRange, PruningConfig, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.sweep.cluster import Cluster
from qlora_core.sweep.driver import SweepDriver
from qlora_core.sweep.ray_connection import ray_connection
from qlora_core.sweep.rungs import TrialLength
from qlora_core.sweep.study import open_study

TRIALS = 1000
WORKERS = 2
STEPS = 8


class IdleWorker:
    """A worker that says it has trained."""

    def load(self) -> dict[str, Any]:
        """Nothing to load."""
        return {"pid": os.getpid()}

    def run(self, trials: Sequence[Mapping[str, Any]], until_steps: Sequence[int]) -> list[dict[str, Any]]:
        """Every trial is at once where it should be."""
        return [_ended(trial, step) for trial, step in zip(trials, until_steps, strict=True)]

    def stop(self) -> None:
        """Nothing runs."""

    def come_back(self) -> None:
        """Nothing runs."""

    def let_go(self) -> None:
        """Nothing is held."""


def _ended(trial: Mapping[str, Any], step: int) -> dict[str, Any]:
    return {
        "id": trial["id"],
        "step": step,
        "total_steps": STEPS,
        "curve": [],
        "validation_loss": trial["params"]["learning_rate"],
        "tokens": step,
        "seconds": 0.0,
        "optimizer": "none",
        "error": None,
        "recoveries": [],
        "micro_batch_size": 1,
        "interrupted": False,
        "held": False,
    }


def measure(trials: int = TRIALS) -> dict[str, Any]:
    """Wall seconds of the whole and of its parts, and milliseconds per trial, without pruning and with halving."""
    logging.getLogger("qlora_core").setLevel(logging.WARNING)
    ways = {"no_pruning": PruningConfig(enabled=False), "halving": PruningConfig()}
    return {"trials": trials, "workers": WORKERS} | {name: _run(trials, way) for name, way in ways.items()}


@contextmanager
def _travelling(module: ModuleType) -> Iterator[None]:
    """Worker processes do not have benchmarks on their path: the class travels with the call."""
    import ray.cloudpickle  # after the connection, for Ray reads its settings once

    ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)


def _run(trials: int, pruning: PruningConfig) -> dict[str, Any]:
    import benchmarks.sweep_overhead as here

    space: dict[str, Any] = {"learning_rate": FloatRange(low=1e-5, high=1e-2, log=True)}
    sweep, train = SweepConfig(method="random", space=space, trials=trials, pruning=pruning), TrainConfig()
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_connection(None, WORKERS),
        _travelling(here),
        open_study(Path(folder) / "study.db", sweep, train, {}) as study,
        Cluster(here.IdleWorker, {}, ComputeConfig(workers=WORKERS), most=WORKERS) as cluster,
    ):
        while len(cluster.idle()) < WORKERS:
            cluster.wait(1.0)
        up = time.perf_counter()
        driver = SweepDriver(study, sweep, train, lambda _: TrialLength(STEPS, 0), None, pack_size=8)
        records = driver.run(cluster)
        done = time.perf_counter()
    states = [record.state for record in records]
    return {
        "states": {state: states.count(state) for state in sorted(set(states))},
        "start_seconds": up - started,
        "sweep_seconds": done - up,
        "whole_seconds": time.perf_counter() - started,
        "sweep_ms_per_trial": 1000 * (done - up) / trials,
    }
