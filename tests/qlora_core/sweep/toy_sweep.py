"""A worker whose trials train nothing but keep real checkpoints, and a sweep of them as a program.

    python toy_sweep.py WORK_DIR STEP_SECONDS [SETTINGS]

Run as a program it is the driver process that tests interrupt and kill; SETTINGS are those of `main` as JSON. The loss
of a step is a recurrence over all steps before it: a step that is left out or done twice changes every loss after it. A
file `hurry` in the folder of the trials makes steps take no time from then on.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import LeaseLostError, TrainingError
from qlora_core.sweep.cluster import Cluster
from qlora_core.sweep.driver import SweepDriver
from qlora_core.sweep.ray_connection import ray_connection
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.rungs import TrialLength
from qlora_core.sweep.study import open_study

TOTAL_STEPS = 16
# A rate of 5 is more than the train section takes.
SWEEP = SweepConfig(space={"learning_rate": [0.1, 0.2, 0.3, 0.4, 5.0]}, max_attempts=1)
TRAIN = TrainConfig()


class ToyWorker:
    """Checkpoints after every step; logs each step; fails as `faults` says.

    Faults are by trial: kill_at, raise_at, lost_at, nan_at, each with a step.
    """

    def __init__(self, trials_dir: str, faults: Mapping[str, Mapping[str, Any]], step_seconds: float) -> None:
        self._trials_dir = Path(trials_dir)
        self._faults = faults
        self._step_seconds = step_seconds
        self._stop = threading.Event()

    def load(self) -> dict[str, Any]:
        """Leave the process id behind, so that a test can look for orphans."""
        self._trials_dir.mkdir(parents=True, exist_ok=True)
        (self._trials_dir / f"{os.getpid()}.pid").touch()
        return {"pid": os.getpid()}

    def run(self, trials: Sequence[Mapping[str, Any]], until_steps: Sequence[int]) -> list[dict[str, Any]]:
        """Train as SweepWorker.run does, one trial of the pack after the other."""
        return [self._run_one(trial, until) for trial, until in zip(trials, until_steps, strict=True)]

    def _run_one(self, trial: Mapping[str, Any], until_step: int) -> dict[str, Any]:
        checkpoint = self._trials_dir / f"{trial['id']}.json"
        state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "loss": 4.0, "curve": []}
        while state["step"] < until_step and not self._stop.is_set():
            self._take_step(trial, state)
            staged = checkpoint.with_suffix(".new")
            staged.write_text(json.dumps(state))
            staged.replace(checkpoint)
        interrupted = state["step"] < until_step
        nan = self._faults.get(trial["id"], {}).get("nan_at") == state["step"]
        return {
            "id": trial["id"],
            "step": state["step"],
            "total_steps": TOTAL_STEPS,
            "curve": state["curve"],
            "validation_loss": None if interrupted else float("nan") if nan else state["loss"],
            "tokens": state["step"] * 10,
            "seconds": 0.0,
            "optimizer": "toy",
            "error": None,
            "recoveries": [],
            "micro_batch_size": 1,
            "interrupted": interrupted,
        }

    def come_back(self) -> None:
        """A toy pack is trained one after the other, so there is nothing to come back for."""

    def let_go(self) -> None:
        """Nothing is held."""

    def stop(self) -> None:
        """End the running segment after its step."""
        self._stop.set()

    def _take_step(self, trial: Mapping[str, Any], state: dict[str, Any]) -> None:
        if not (self._trials_dir / "hurry").exists():
            time.sleep(self._step_seconds)
        step = state["step"] + 1
        fault = self._faults.get(trial["id"], {})
        if fault.get("raise_at") == step:
            raise TrainingError(f"the loss at step {step} is not finite")
        if fault.get("lost_at") == step:
            raise LeaseLostError(f"trial {trial['id']} was taken over")
        if fault.get("kill_at") == step and self._is_due(trial["id"], fault):
            os.kill(os.getpid(), signal.SIGKILL)
        rate = trial["params"]["learning_rate"]
        state["loss"] = state["loss"] * (1 - rate / (step + 1)) + 0.001 * step
        state["step"] = step
        state["curve"].append({"step": step, "loss": state["loss"], "learning_rate": rate, "grad_norm": float("inf")})
        with (self._trials_dir / "steps.log").open("a") as log:
            log.write(f"{trial['id']} {step}\n")

    def _is_due(self, trial: str, fault: Mapping[str, Any]) -> bool:
        deaths = self._trials_dir / f"{trial}.deaths"
        count = int(deaths.read_text()) if deaths.exists() else 0
        deaths.write_text(str(count + 1))
        return count < fault.get("times", 1)


def length_of(params: TrainConfig) -> TrialLength:
    """Every toy trial is as long as the others, without warm-up."""
    return TrialLength(TOTAL_STEPS, 0)


def toy_sweep(
    work_dir: Path,
    *,
    workers: int | None = 2,
    faults: Mapping[str, Mapping[str, Any]] | None = None,
    step_seconds: float = 0.0,
    sweep: SweepConfig = SWEEP,
    pack_size: int = 1,
) -> list[TrialRecord]:
    """A whole sweep of toy trials, inside a Ray connection."""
    arguments = {"trials_dir": str(work_dir / "trials"), "faults": dict(faults or {}), "step_seconds": step_seconds}
    with (
        open_study(work_dir / "study.db", sweep, TRAIN, {}) as study,
        Cluster(ToyWorker, arguments, ComputeConfig(workers=workers), most=4) as cluster,
    ):
        return SweepDriver(study, sweep, TRAIN, length_of, None, pack_size=pack_size).run(cluster)


def main(
    work_dir: Path,
    step_seconds: float,
    *,
    address: str | None = None,
    workers: int | None = 2,
    rates: Sequence[float] = (),
    **sweep: Any,
) -> None:
    """A toy sweep of its own connection; leaves its rows in `rows.json`. `sweep`: fields of the sweep section."""
    logging.basicConfig(level=logging.INFO)
    settings = SweepConfig(space={"learning_rate": list(rates)}, **sweep) if rates else SWEEP
    with ray_connection(address, workers):
        records = toy_sweep(work_dir, workers=workers, step_seconds=step_seconds, sweep=settings)
    (work_dir / "rows.json").write_text(json.dumps([record.row() for record in records]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), **json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}"))
