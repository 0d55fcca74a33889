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
    """One sweep. `length_of`: a trial's steps, from its settings; `on_trial` gets the row of a trial that changed.

    A worker trains up to `pack_size` trials at a time; a trial whose worker died goes alone from then on, so that one
    that kills its worker takes no neighbour along twice.
    """

    def __init__(
        self,
        study: SweepStudy,
        sweep: SweepConfig,
        train: TrainConfig,
        length_of: LengthOf,
        on_trial: OnTrial | None,
        *,
        pack_size: int = 1,
    ) -> None:
        self._study = study
        self._sweep = sweep
        self._train = train
        self._length_of = length_of
        self._on_trial = on_trial
        self.pack_size = pack_size

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
        idle = cluster.idle()
        for place, worker in enumerate(idle):
            share = -(-self._halving.open_segments // (len(idle) - place))
            pack = self._next_pack(min(self._driver.pack_size, share))
            if not pack:
                return
            records = [self._records[segment.trial] for segment in pack]
            for segment in pack:
                _LOGGER.info("trial %s goes to %s, up to step %d", segment.trial, worker, segment.until_step)
            orders = [{"id": record.id, "params": record.params, "rungs": record.rungs} for record in records]
            cluster.submit(worker, pack, "run", orders, [segment.until_step for segment in pack])

    def _next_pack(self, most: int) -> list[Segment]:
        """Segments to train together, taken from the cohort; all in one precision, for they share a base."""
        pack: list[Segment] = []
        while len(pack) < most and (segment := self._halving.next_segment()) is not None:
            record = self._records[segment.trial]
            together = not pack or (record.deaths == 0 and self._precision(segment) == self._precision(pack[0]))
            if not together:
                self._halving.release(segment.trial)
                break
            pack.append(segment)
            if record.deaths:
                break
        return pack

    def _precision(self, segment: Segment) -> str:
        return self._records[segment.trial].params["precision"]

    def _take(self, outcome: Outcome, advance: Callable[[float], None]) -> None:
        pack: list[Segment] = outcome.task
        records = [self._records[segment.trial] for segment in pack]
        before = sum(record.steps for record in records)
        results: list[Any] = [None] * len(pack) if outcome.result is None else list(outcome.result)
        for record, segment, progress in zip(records, pack, results, strict=True):
            if progress is None and outcome.died:
                self._take_death(record, outcome.error)
            elif progress is None:
                self._fail(record, str(outcome.error))
            elif progress["error"] is not None:
                record.add_progress(progress)
                self._fail(record, progress["error"])
            else:
                self._take_progress(record, segment, progress)
        advance(sum(record.steps for record in records) - before)
        changed = [other for other in self._records.values() if self._take_state(other)]
        for other in [*(record for record in records if record not in changed), *changed]:
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
