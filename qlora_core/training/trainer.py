"""Trains the trials of a pack together over one loaded base, in segments that add up to one run.

A pass computes the next micro-batch of every trial at once; each trial steps when its own effective batch is complete.
No trial's result depends on its neighbours: to 1e-10 in float64, to rounding in float32; alone, segments and resumes
are bit-equal on a CPU. Knows nothing of how trials are chosen, compared or where the base came from.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import TokenRow
from qlora_core.digest import digest_file, digest_json
from qlora_core.errors import NumericError, TrainingError
from qlora_core.model.adapter import WEIGHTS_FILE
from qlora_core.model.base import PRECISIONS
from qlora_core.model.encoder_decoder import is_encoder_decoder
from qlora_core.model.packed_attention import check_isolation
from qlora_core.progress import progress_bar
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.base_untouched import BaseUntouched
from qlora_core.training.checkpoint import CheckpointKeeper
from qlora_core.training.checkpointing import recomputed_activations
from qlora_core.training.export import capture, write_adapter
from qlora_core.training.frozen_parent import FrozenParent
from qlora_core.training.objectives import Objectives
from qlora_core.training.original_weights import OriginalWeights
from qlora_core.training.pack.pack import Pack
from qlora_core.training.pass_loop import train_pass
from qlora_core.training.preflight import (
    check_rows,
    digest_rows,
    fingerprint_base,
    packed_rows,
    trainable_rows,
    warn_of_few_examples,
)
from qlora_core.training.sensitivity import sensitive_modules
from qlora_core.training.sequence import write_sequence
from qlora_core.training.step_log import StepLog
from qlora_core.training.trial import Trial, TrialProgress
from qlora_core.training.trial_run import TrialRun
from qlora_core.training.trial_shelf import TrialShelf
from qlora_core.training.warm_start import start_from

logger = logging.getLogger(__name__)

MOST_RECOVERIES = 2


def _never() -> bool:
    return False


@dataclass(frozen=True)
class PassLimits:
    """How memory has passes computed, beyond what trials are configured to; changes results by rounding only.

    `recompute`: gradient checkpointing for all; `most_rows`: the largest micro-batch.
    """

    recompute: bool = False
    most_rows: int | None = None


class Trainer:
    """Trains trials on `base` (frozen, with no adapter on it) and keeps their checkpoints under `work_dir/<trial id>`.

    With a `keeper`, the newest one is also kept beyond this machine, and a trial goes on from that one where it is
    further than what is here.

    `packs` lists training rows by sequence, as `read_packs` gives them. Then a batch is made of sequences, and
    `micro_batch_size` counts these; the loss stays the mean over trained tokens. Validation rows are never packed, and
    batches of preference pairs are made of pairs. `original` is the folder of the checkpoint that the base was
    quantized from, for starts that need it; `start` the PEFT folder that every trial begins from, if one; `parent` the
    one that stays as it is under every trial.

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
        limits: PassLimits | None = None,
        original: Path | None = None,
        start: Path | None = None,
        parent: Path | None = None,
    ) -> None:
        self._base = base
        self._limits = limits or PassLimits()
        self._original = original
        self._start = start
        self._train = trainable_rows(train, "train")
        sequences: Sequence[TokenRow] = self._train if packs is None else packed_rows(self._train, packs)
        self._validation = trainable_rows(validation, "validation")
        check_rows(self._train, base, "train")
        check_rows(self._validation, base, "validation")
        base.requires_grad_(False)
        base.config.use_cache = False
        # Part of every checkpoint's identity; taken here, while the base has no adapter on it
        inputs = {"training data": digest_rows(self._train), "base model": fingerprint_base(base)}
        self._parent = None if parent is None else FrozenParent(base, parent)
        if self._parent is not None:
            inputs["parent"] = self._parent.digest
        self._pack = Pack(base)
        if packs is not None:
            if is_encoder_decoder(base):
                raise TrainingError(
                    f"{type(base).__name__} has an encoder and a decoder, and rows cannot share a sequence of theirs; "
                    "set data.packing.enabled to false"
                )
            if not self._pack.end_to_end:  # which is to keep documents apart already
                check_isolation(base)
            inputs["packed sequences"] = digest_json([list(ids) for ids in packs])
        if start is not None:
            inputs["start"] = digest_file(start / WEIGHTS_FILE)
        self._shelf = TrialShelf(work_dir, inputs, keeper)
        self._objectives = Objectives(self._pack, self._train, sequences, self._validation)
        self._log = StepLog(work_dir, base.device)
        self._held: dict[str, TrialRun] = {}

    def run(
        self,
        trials: Sequence[Trial],
        until_step: int | Sequence[int] | None,
        should_stop: Callable[[], bool] = _never,
        should_return: Callable[[], bool] | None = None,
    ) -> list[TrialProgress]:
        """Train the trials together to `until_step` (one for all or one each; None: their end), and score them.

        Each is checkpointed there, and its validation loss is taken over all validation rows.

        A trial goes on from its newest valid checkpoint. One that is already there or further is only scored; how it
        stood at `until_step` comes back instead where a further checkpoint knows that. `should_stop` is asked before
        every step: once true, every trial is checkpointed at its last whole step and comes back as `interrupted`, to be
        taken up by the same call later. Results are in the order of `trials`.

        With `should_return`, the call ends as soon as one trial is where it should be or cannot go on, or when that is
        true, asked before every pass. The others come back as `interrupted` too and are `held`: they stay in their
        slots, even in the middle of a step, and the next call that names them goes on there. A call that does not name
        a held trial checkpoints it and lets it go, as `release` does.

        A trial that cannot go on comes back with its `error`, and the others go on: a loss or gradient that is not
        finite or jumps even after two roll-backs, memory that does not suffice for one row, a checkpoint of other
        settings, data or base, target modules that match nothing, preference learning on data without pairs.
        Checkpoints taken before stay usable.

        Raises:
            TrainingError: the call itself is impossible, or the disk refuses.
        """
        ids = [trial.id for trial in trials]
        if len(set(ids)) < len(ids):
            raise TrainingError(f"trial ids {ids} are not unique, so their checkpoints would mix; rename one")
        until = list(until_step) if isinstance(until_step, Sequence) else [until_step] * len(trials)
        if len(until) != len(trials) or any(step is not None and step < 1 for step in until):
            raise TrainingError(
                f"until_step is {until_step}; give one step for all trials or one each, 1 or later, or None"
            )
        with BaseUntouched(self._base):
            segment = _Segment(self, [trial.id for trial in trials])
            try:
                self._release_but(ids)
                segment.enter(trials, until)
                segment.train(should_stop, should_return)
                return segment.score()
            finally:
                segment.close()

    @property
    def held(self) -> frozenset[str]:
        """The trials that stay in their slots between calls."""
        return frozenset(self._held)

    def release(self) -> None:
        """Checkpoint what is held at its last whole step, and free the slots."""
        self._release_but(())

    def _release_but(self, kept: Sequence[str]) -> None:
        for name in self._held.keys() - set(kept):
            run = self._held.pop(name)
            try:
                run.drop_open_step()
                self._shelf.save_if_new(run)
            finally:
                self._end(run)

    def export(self, trial: Trial, out: Path) -> None:
        """Write the trial's newest checkpoint to `out` as a PEFT folder with golden logits, verified by reloading it.

        Over a parent: fused with it, and the child itself in `out`/child, see `write_sequence`.

        Raises:
            TrainingError: there is no checkpoint, nothing was learned, or the folder does not reproduce the logits.
        """
        self.release()
        run = self._begin(trial)
        try:
            if not self._shelf.resume(run):
                raise TrainingError(f"trial {trial.id} has no checkpoint under {self._shelf.folder}; train it first")
            trained = capture(self._pack, run.slot, self._validation + self._train)
        finally:
            self._end(run)
        if self._parent is None:
            write_adapter(self._base, trained, out)
        else:
            write_sequence(self._base, self._parent, trained, out)

    def _begin(self, trial: Trial) -> TrialRun:
        """A fresh adapter for the trial, in a slot of its own."""
        wanted = PRECISIONS.get(trial.params.precision)
        if wanted is not None and wanted != self._base.dtype:
            raise TrainingError(
                f"trial {trial.id} asks for precision {trial.params.precision}, but the base is loaded in "
                f"{self._base.dtype}; load it in that precision or use train.precision: auto"
            )
        if self._parent is not None:
            self._parent.check(trial.params)
        examples = self._objectives.examples(trial.params.objective)
        config = lora_config(self._base, trial.params, self._modules(trial))
        slot = self._pack.fill(config, trial.params.seed, self._residuals(trial.params))
        if self._start is not None:
            start_from(self._pack.weights(slot), self._start, trial.params)
        return TrialRun(trial, slot, self._pack.weights(slot), examples, most_rows=self._limits.most_rows)

    def _modules(self, trial: Trial) -> list[str] | None:
        """The layers a probe chooses, or has chosen for the trial before; None where the settings name them."""
        if trial.params.sensitive_layers is None:
            return None
        examples = self._objectives.examples(trial.params.objective)
        return self._shelf.adapted_modules(trial) or sensitive_modules(self._pack, trial.params, examples)

    def _residuals(self, params: TrainConfig) -> OriginalWeights | None:
        if params.lora_init != "loftq":
            return None
        if self._original is None:
            raise TrainingError(
                "train.lora_init loftq needs the unquantized weights, and this base comes without them; name a "
                "checkpoint as base.model, or use another train.lora_init"
            )
        return OriginalWeights(self._original)

    def _end(self, run: TrialRun) -> None:
        run.optimizer.release()
        self._pack.free(run.slot)


class _Segment:
    """One call of `Trainer.run`: the trials that are going, and what has become of the others."""

    def __init__(self, trainer: Trainer, order: list[str]) -> None:
        self._trainer = trainer
        self._order = order
        self._until: dict[str, int] = {}
        self._runs: dict[str, TrialRun] = {}
        self._results: dict[str, TrialProgress] = {}
        self._interrupted = False
        self._returns_early = False

    def enter(self, trials: Sequence[Trial], until: Sequence[int | None]) -> None:
        """Fill a slot for each trial and take it up where its checkpoint left it."""
        for trial, until_step in zip(trials, until, strict=True):
            self._enter(trial, until_step)

    def _enter(self, trial: Trial, until_step: int | None) -> None:
        trainer = self._trainer
        held = trainer._held.pop(trial.id, None)
        if held is not None:
            self._runs[trial.id] = held
            self._until[trial.id] = held.total_steps if until_step is None else min(until_step, held.total_steps)
            return
        try:
            run = trainer._begin(trial)
        except TrainingError as error:
            self._results[trial.id] = _refused(trial, error)
            return
        self._runs[trial.id] = run
        try:
            trainer._shelf.resume(run)
        except TrainingError as error:
            self._fail(run, error)
            return
        if not run.counters.step:
            warn_of_few_examples(trial, len(trainer._objectives.examples(trial.params.objective).lengths))
        trainer._log.begin(run)
        self._until[trial.id] = run.total_steps if until_step is None else min(until_step, run.total_steps)
        if (earlier := run.progress_at(self._until[trial.id])) is not None:
            self._results[trial.id] = earlier

    def train(self, should_stop: Callable[[], bool], should_return: Callable[[], bool] | None) -> None:
        """Passes until every trial is where it should be, has failed, or training is asked to stop or to return."""
        configured = any(run.trial.params.gradient_checkpointing for run in self._runs.values())
        title = f"Training {' '.join(self._order)}"
        with (
            recomputed_activations(self._trainer._base, wanted=configured or self._trainer._limits.recompute),
            progress_bar(title, sum(self._until.values())) as advance,
        ):
            advance(sum(run.counters.step for run in self._runs.values()))
            while going := self._going():
                if any(run.between_steps for run in going) and should_stop():
                    self._interrupted = True
                    break
                if should_return is not None and (len(going) < len(self._order) or should_return()):
                    self._returns_early = True
                    return
                for run, fault in train_pass(self._trainer._pack, going):
                    before = run.counters.step
                    if fault is None:
                        self._trainer._log.add(run, len(going))
                    self._settle(run, fault)
                    advance(run.counters.step - before if fault else 1)
        for run in self._going():
            run.drop_open_step()
            self._trainer._shelf.save_if_new(run)

    def score(self) -> list[TrialProgress]:
        """The results in the order asked for; trials without one yet are scored, unless training was to stop."""
        for name, run in self._runs.items():
            if name in self._results:
                continue
            if (self._interrupted or self._returns_early) and run.counters.step < self._until[name]:
                self._results[name] = run.progress(None)
                continue
            self._results[name] = self._trainer._objectives.score(run)
        if self._returns_early:
            going = [name for name in self._runs if self._results[name].interrupted]
            self._trainer._held.update((name, self._runs.pop(name)) for name in going)
        return [self._results[name] for name in self._order]

    def close(self) -> None:
        """Free every slot."""
        self._trainer._log.flush()
        with ExitStack() as stack:
            for run in self._runs.values():
                stack.callback(self._trainer._end, run)

    def _going(self) -> list[TrialRun]:
        return [
            run
            for name, run in self._runs.items()
            if name not in self._results and run.counters.step < self._until[name]
        ]

    def _settle(self, run: TrialRun, fault: TrainingError | None) -> None:
        """After a step was taken, or refused by `fault`."""
        shelf, every = self._trainer._shelf, run.trial.params.checkpoint_every_steps
        if isinstance(fault, NumericError) and len(run.counters.recoveries) < MOST_RECOVERIES:
            self._roll_back(run, fault)
        elif fault is not None:
            self._fail(run, fault)
        elif run.counters.step % every == 0 or run.counters.step == self._until[run.trial.id]:
            shelf.save(run)

    def _roll_back(self, run: TrialRun, fault: NumericError) -> None:
        """To the newest checkpoint, or to the start where there is none; half the rate, and past what led here."""
        logger.warning("trial %s rolls back: %s", run.trial.id, fault)
        reached = replace(run.counters)
        if not self._trainer._shelf.resume(run):
            self._trainer._end(run)
            fresh = self._trainer._begin(run.trial)
            self._runs[run.trial.id] = run = fresh
        start = run.counters
        run.counters = reached
        run.recover(fault, replace(start, recoveries=reached.recoveries))
        self._trainer._log.begin(run)
        # Else a crash before the next checkpoint would forget the recovery and meet the fault again
        self._trainer._shelf.save(run)

    def _fail(self, run: TrialRun, error: TrainingError) -> None:
        logger.error("trial %s ends at step %d: %s", run.trial.id, run.counters.step, error)
        run.drop_open_step()
        self._results[run.trial.id] = run.progress(None, str(error))


def _refused(trial: Trial, error: TrainingError) -> TrialProgress:
    return TrialProgress(trial.id, 0, 0, [], None, 0, 0.0, trial.params.optimizer, error=str(error))
