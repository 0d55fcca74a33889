"""Checkpoints of trials: saved, found again, and refused where they belong to another training.

Knows folders and identities; knows nothing of how a trial trains.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.errors import TrainingError
from qlora_core.model.adapter import target_modules_of
from qlora_core.training.checkpoint import Checkpoint, CheckpointKeeper, newest_checkpoint, save_checkpoint
from qlora_core.training.trial import Trial
from qlora_core.training.trial_run import TrialRun

logger = logging.getLogger(__name__)


class TrialShelf:
    """The checkpoints under `folder/<trial id>`. `inputs` name data and base by digest; all of them must agree."""

    def __init__(self, folder: Path, inputs: Mapping[str, str], keeper: CheckpointKeeper | None) -> None:
        self.folder = folder
        self._inputs = dict(inputs)
        self._keeper = keeper
        self._saved: dict[str, int] = {}

    def save(self, run: TrialRun) -> None:
        """Write a checkpoint of the run as it stands, between steps; raises TrainingError where the disk refuses."""
        checkpoint = save_checkpoint(
            self.folder / run.trial.id,
            run.counters.step,
            {name: value.detach().to("cpu", copy=True).contiguous() for name, value in run.weights.named()},
            run.optimizer.state_tensors(),
            run.state() | {"identity": self._identity(run.trial)},
            best_step=_best_step(run),
        )
        self._saved[run.trial.id] = run.counters.step
        if self._keeper is not None:
            self._keeper.keep(run.trial.id, checkpoint)

    def save_if_new(self, run: TrialRun) -> None:
        """Write a checkpoint unless the run stands where the last one was taken, or has not begun."""
        if run.counters.step > self._saved.get(run.trial.id, 0):
            self.save(run)

    def resume(self, run: TrialRun) -> bool:
        """Put the run where its newest valid checkpoint left it; False where there is none.

        Raises:
            TrainingError: the checkpoint belongs to other settings, data or base.
        """
        checkpoint = self._newest(run.trial)
        self._saved[run.trial.id] = 0 if checkpoint is None else checkpoint.step
        if checkpoint is None:
            return False
        state = checkpoint.state()
        if fault := _misfit(state["identity"], self._identity(run.trial)):
            raise TrainingError(
                f"checkpoint {checkpoint.folder} belongs to another training: {fault}; use another compute.work_dir or "
                f"delete {checkpoint.folder.parent}"
            )
        run.restore(state, checkpoint.adapter(), checkpoint.optimizer())
        logger.info("trial %s goes on from %s", run.trial.id, checkpoint.folder)
        return True

    def adapted_modules(self, trial: Trial) -> list[str] | None:
        """The layers that the trial's newest checkpoint adapts, by whole names; None where it has none."""
        checkpoint = self._newest(trial)
        if checkpoint is None or _misfit(checkpoint.state()["identity"], self._identity(trial)):
            return None
        return target_modules_of(checkpoint.adapter())

    def _newest(self, trial: Trial) -> Checkpoint | None:
        """The newest valid checkpoint of a trial, brought here first if a newer one is kept elsewhere and fits."""
        folder = self.folder / trial.id
        local = newest_checkpoint(folder)
        if self._keeper is None or not self._keeper.bring_back(trial.id, folder, local):
            return local
        kept = newest_checkpoint(folder)
        if kept is None or kept == local or not (fault := _misfit(kept.state()["identity"], self._identity(trial))):
            return kept
        # Not refused, as one of this folder would be: nobody can have meant it, and training anew loses time only.
        logger.warning("trial %s: the kept checkpoint %s is not used: %s", trial.id, kept.folder.name, fault)
        shutil.rmtree(kept.folder)
        return local

    def _identity(self, trial: Trial) -> dict[str, Any]:
        """What a checkpoint's numbers depend on. How often one is written is no part of it."""
        return trial.params.model_dump(mode="json", exclude={"checkpoint_every_steps"}) | self._inputs


def _best_step(run: TrialRun) -> int | None:
    scores = run.counters.scores
    return min(scores, key=lambda step: (scores[step], step)) if scores else None


def _misfit(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """How a checkpoint's identity differs from the wanted one; None if it does not."""
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            return f"{key} is {stored.get(key)!r} there and {wanted.get(key)!r} here"
    return None
