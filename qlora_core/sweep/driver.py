"""The loop of a sweep: draw trials, hand segments to workers, take in results, halve, until every trial is finished.

Nothing here depends on how many workers there are or how fast they are; that decides only how soon the sweep ends.
Knows nothing of Ray or SQLite (the cluster and the study do) or of how a trial trains (the workers do).
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import SweepError
from qlora_core.progress import progress_bar
from qlora_core.sweep.cluster import Cluster, Outcome
from qlora_core.sweep.halving import Halving, Segment, replay
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.rungs import TrialLength, expected_steps, plan_rungs
from qlora_core.sweep.space import cohort_size, trial_count, trial_params
from qlora_core.sweep.study import SweepStudy

_WAIT_S = 1.0
"""Longest time a Ctrl-C may go unheard."""

OnTrial = Callable[[dict[str, Any]], None]
LengthOf = Callable[[TrainConfig], TrialLength]
_LOGGER = logging.getLogger(__name__)


class SweepDriver:
    """One sweep. `length_of`: a trial's steps, from its settings; `on_trial` gets the row of a trial that changed."""

    def __init__(
        self, study: SweepStudy, sweep: SweepConfig, train: TrainConfig, length_of: LengthOf, on_trial: OnTrial | None
    ) -> None:
        self._study = study
        self._sweep = sweep
        self._train = train
        self._length_of = length_of
        self._on_trial = on_trial

    def run(self, cluster: Cluster) -> list[TrialRecord]:
        """Finish every trial of the sweep, from where an earlier driver had left it; the records in the order drawn."""
        count, size = trial_count(self._sweep), cohort_size(self._sweep)
        finished: list[TrialRecord] = []
        for first in range(0, count, size):
            records = self._study.records(min(first + size, count))[first:]
            _Cohort(self, self._study, self._sweep, records).run(cluster)
            finished.extend(records)
        return finished

    def length_of(self, record: TrialRecord) -> TrialLength:
        """Steps of a trial; SweepError when its point is no valid `train` section."""
        drawn = {name: record.params[name] for name in self._sweep.space}
        return self._length_of(trial_params(self._train, drawn))

    def publish(self, record: TrialRecord) -> None:
        """Log where a trial stands and hand its row on."""
        loss = "no loss yet" if record.loss is None else f"loss {record.loss:.4f}"
        reason = f": {record.error}" if record.error else ""
        _LOGGER.info("trial %s %s at step %d, %s%s", record.id, record.state, record.steps, loss, reason)
        if self._on_trial is not None:
            self._on_trial(record.row())


class _Cohort:
    """Trials drawn together, halved against each other."""

    def __init__(self, driver: SweepDriver, study: SweepStudy, sweep: SweepConfig, records: list[TrialRecord]) -> None:
        self._driver = driver
        self._study = study
        self._sweep = sweep
        self._records = {record.id: record for record in records}
        lengths = self._lengths()
        self._rungs = plan_rungs(lengths, sweep.pruning)
        self._halving = Halving(self._rungs, sweep.pruning.reduction_factor)

    def run(self, cluster: Cluster) -> None:
        """Work until every trial of the cohort is finished."""
        failed = [record.id for record in self._records.values() if record.error is not None]
        replay(self._halving, {trial: self._records[trial].rung_losses for trial in self._rungs}, failed)
        for record in self._records.values():
            self._take_state(record)
            self._driver.publish(record)
        factor = self._sweep.pruning.reduction_factor
        steps = expected_steps(self._rungs, factor)
        with progress_bar(f"Training {len(self._records)} trials", steps) as advance:
            advance(sum(record.steps for record in self._records.values()))
            while not self._halving.finished:
                self._dispatch(cluster)
                for outcome in cluster.wait(_WAIT_S):
                    self._take(outcome, advance)

    def _lengths(self) -> dict[str, TrialLength]:
        lengths: dict[str, TrialLength] = {}
        for record in self._records.values():
            try:
                lengths[record.id] = self._driver.length_of(record)
            except SweepError as error:
                if record.state != "failed":
                    record.error, record.state = str(error), "failed"
                    self._study.save(record)
                    self._study.tell(record)
        return lengths

    def _dispatch(self, cluster: Cluster) -> None:
        for worker in cluster.idle():
            segment = self._halving.next_segment()
            if segment is None:
                return
            record = self._records[segment.trial]
            _LOGGER.info("trial %s goes to %s, up to step %d", segment.trial, worker, segment.until_step)
            order = {"id": record.id, "params": record.params, "rungs": record.rungs}
            cluster.submit(worker, segment, "run", order, segment.until_step)

    def _take(self, outcome: Outcome, advance: Callable[[float], None]) -> None:
        segment: Segment = outcome.task
        record = self._records[segment.trial]
        before = record.steps
        if outcome.result is not None:
            self._take_progress(record, segment, outcome.result)
        elif outcome.died:
            self._take_death(record, outcome.error)
        else:
            self._fail(record, str(outcome.error))
        advance(record.steps - before)
        changed = [other for other in self._records.values() if self._take_state(other)]
        for other in changed if record in changed else [record, *changed]:
            self._driver.publish(other)

    def _take_progress(self, record: TrialRecord, segment: Segment, progress: Mapping[str, Any]) -> None:
        record.add_progress(progress)
        loss, step = progress["validation_loss"], progress["step"]
        if progress["interrupted"]:
            self._study.save(record)
            self._halving.release(record.id)
        elif step != segment.until_step:
            self._fail(record, f"the worker ended at step {step} instead of {segment.until_step}")
        elif loss is None or not math.isfinite(loss):
            self._fail(record, f"the validation loss at step {step} is {loss}")
        else:
            self._study.save(record)
            self._halving.report(record.id, loss)

    def _take_death(self, record: TrialRecord, reason: str | None) -> None:
        record.deaths += 1
        if record.deaths > self._sweep.max_attempts:
            self._fail(record, f"its worker died {record.deaths} times, the last time with: {reason}")
            return
        _LOGGER.warning("trial %s lost its worker (%s) and goes on from its last checkpoint", record.id, reason)
        self._study.save(record)
        self._halving.release(record.id)

    def _fail(self, record: TrialRecord, error: str) -> None:
        record.error = error
        self._study.save(record)
        self._halving.fail(record.id)

    def _take_state(self, record: TrialRecord) -> bool:
        state = self._halving.states.get(record.id, record.state)
        changed = state != record.state
        record.state = state
        self._study.tell(record)
        return changed
