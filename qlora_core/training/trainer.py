"""Trains the trials of a pack over one loaded base, in segments that add up to one run, bit for bit on a float32 CPU.

Trials are trained one after the other; no trial's result depends on the others of its pack. Knows nothing of how trials
are chosen, compared or where the base came from.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.digest import digest_json
from qlora_core.errors import TrainingError
from qlora_core.model.base import PRECISIONS
from qlora_core.model.loss import sequence_losses
from qlora_core.model.packed_attention import check_isolation
from qlora_core.progress import progress_bar
from qlora_core.training.checkpoint import Checkpoint, CheckpointKeeper, newest_checkpoint, save_checkpoint
from qlora_core.training.export import capture, write_adapter
from qlora_core.training.lora import attached_adapter, own_generators
from qlora_core.training.preflight import check_rows, digest_rows, fingerprint_base, packed_rows, trainable_rows
from qlora_core.training.schedule import total_steps
from qlora_core.training.trial import Trial, TrialProgress
from qlora_core.training.trial_run import TrialRun

__all__ = ["Trainer", "total_steps"]

logger = logging.getLogger(__name__)

# One size for all trials, so that their validation losses are sums of the same batches
VALIDATION_BATCH_ROWS = 8


def _never() -> bool:
    return False


class Trainer:
    """Trains trials on `base` (frozen, with no adapter on it) and keeps their checkpoints under `work_dir/<trial id>`.

    With a `keeper`, the newest one is also kept beyond this machine, and a trial goes on from that one where it is
    further than what is here.

    `packs` lists training rows by sequence, as `read_packs` gives them. Then a batch is made of sequences, and
    `micro_batch_size` counts these; the loss stays the mean over trained tokens. Validation rows are never packed.

    Raises TrainingError at once for data no trial can be trained on: no rows, all labels masked, rows longer than the
    base's positions, tokens outside its vocabulary, packs of other rows; and ModelError for packs on a base that does
    not keep the rows of a sequence apart.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        train: Sequence[TokenRow],
        validation: Sequence[TokenRow],
        work_dir: Path,
        keeper: CheckpointKeeper | None = None,
        packs: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self._base = base
        self._train = trainable_rows(train, "train")
        self._sequences: Sequence[TokenRow] = self._train if packs is None else packed_rows(self._train, packs)
        self._validation = trainable_rows(validation, "validation")
        self._work_dir = work_dir
        self._keeper = keeper
        check_rows(self._train, base, "train")
        check_rows(self._validation, base, "validation")
        base.requires_grad_(False)
        base.config.use_cache = False
        # Part of every checkpoint's identity; taken here, while the base has no adapter on it
        self._inputs = {"training data": digest_rows(self._train), "base model": fingerprint_base(base)}
        if packs is not None:
            check_isolation(base)
            self._inputs["packed sequences"] = digest_json([list(ids) for ids in packs])

    def run(
        self, trials: Sequence[Trial], until_step: int | None, should_stop: Callable[[], bool] = _never
    ) -> list[TrialProgress]:
        """Train each trial to `until_step` (None: its end), checkpoint it, and score it on all validation rows.

        A trial goes on from its newest valid checkpoint. One that is already there or further is only scored; how it
        stood at `until_step` comes back instead where a further checkpoint knows that. `should_stop` is asked before
        every step: once true, the trial is checkpointed and it and the rest of the pack come back as `interrupted`, to
        be taken up by the same call later. Results are in the order of `trials`.

        Raises:
            TrainingError: loss or gradients that are not finite, target modules that match nothing, a checkpoint of
                other settings, data or base, a disk that refuses. Checkpoints taken before stay usable.
        """
        ids = [trial.id for trial in trials]
        if len(set(ids)) < len(ids):
            raise TrainingError(f"trial ids {ids} are not unique, so their checkpoints would mix; rename one")
        if until_step is not None and until_step < 1:
            raise TrainingError(f"until_step is {until_step}; train to step 1 or later, or None for the end")
        return [self._run_one(trial, until_step, should_stop) for trial in trials]

    def export(self, trial: Trial, out: Path) -> None:
        """Write the trial's newest checkpoint to `out` as a PEFT folder with golden logits, verified by reloading it.

        Raises:
            TrainingError: there is no checkpoint, nothing was learned, or the folder does not reproduce the logits.
        """
        with attached_adapter(self._base, trial.params) as adapter:
            run = TrialRun(trial, adapter, self._sequences)
            if self._resume(run) is None:
                raise TrainingError(f"trial {trial.id} has no checkpoint under {self._work_dir}; train it first")
            trained = capture(adapter, self._validation + self._train)
        write_adapter(self._base, trained, out)

    def _run_one(self, trial: Trial, until_step: int | None, should_stop: Callable[[], bool]) -> TrialProgress:
        self._check_precision(trial)
        with attached_adapter(self._base, trial.params) as adapter, own_generators(self._base.device):
            run = TrialRun(trial, adapter, self._sequences)
            self._resume(run)
            until = run.total_steps if until_step is None else min(until_step, run.total_steps)
            if (earlier := run.progress_at(until)) is not None:
                return earlier
            if not self._train_to(run, until, should_stop):
                return run.progress(validation_loss=None)
            adapter.eval_mode()
            return run.progress(self._validate(run))

    def _train_to(self, run: TrialRun, until: int, should_stop: Callable[[], bool]) -> bool:
        """Take steps up to `until` with checkpoints on the way; False when asked to stop before."""
        params, counters = run.trial.params, run.counters
        run.adapter.train_mode(gradient_checkpointing=params.gradient_checkpointing)
        saved = counters.step
        with progress_bar(f"Training {run.trial.id}", until) as advance:
            advance(counters.step)
            while counters.step < until and not should_stop():
                run.train_step()
                advance(1)
                if counters.step % params.checkpoint_every_steps == 0 or counters.step == until:
                    saved = self._save(run).step
        if saved < counters.step:
            self._save(run)
        return counters.step >= until

    def _validate(self, run: TrialRun) -> float:
        losses = sequence_losses(run.adapter.base, self._validation, batch_size=VALIDATION_BATCH_ROWS)
        loss = sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss of trial {run.trial.id} is {loss} after step {run.counters.step}; lower "
                "train.learning_rate"
            )
        return loss

    def _save(self, run: TrialRun) -> Checkpoint:
        checkpoint = save_checkpoint(
            self._work_dir / run.trial.id,
            run.counters.step,
            run.adapter.tensors(),
            run.optimizer.state_tensors(),
            run.state() | {"identity": self._identity(run.trial)},
        )
        if self._keeper is not None:
            self._keeper.keep(run.trial.id, checkpoint)
        return checkpoint

    def _resume(self, run: TrialRun) -> Checkpoint | None:
        """Put the run where its newest valid checkpoint left it; None where there is none."""
        checkpoint = self._newest(run.trial)
        if checkpoint is None:
            return None
        state = checkpoint.state()
        if fault := _misfit(state["identity"], self._identity(run.trial)):
            raise TrainingError(
                f"checkpoint {checkpoint.folder} belongs to another training: {fault}; use another compute.work_dir or "
                f"delete {checkpoint.folder.parent}"
            )
        run.restore(state, checkpoint.adapter(), checkpoint.optimizer())
        logger.info("trial %s goes on from %s", run.trial.id, checkpoint.folder)
        return checkpoint

    def _newest(self, trial: Trial) -> Checkpoint | None:
        """The newest valid checkpoint of a trial, brought here first if a newer one is kept elsewhere and fits."""
        folder = self._work_dir / trial.id
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

    def _check_precision(self, trial: Trial) -> None:
        wanted = PRECISIONS.get(trial.params.precision)
        if wanted is not None and wanted != self._base.dtype:
            raise TrainingError(
                f"trial {trial.id} asks for precision {trial.params.precision}, but the base is loaded in "
                f"{self._base.dtype}; load it in that precision or use train.precision: auto"
            )


def _misfit(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """How a checkpoint's identity differs from the wanted one; None if it does not."""
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            return f"{key} is {stored.get(key)!r} there and {wanted.get(key)!r} here"
    return None
