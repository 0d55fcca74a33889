"""Trials compared with each other, from the first segment to the last: hands segments out, takes results in.

A worker trains a pack and comes back as soon as one trial of it has ended its segment; the others stay in its memory,
the free slot gets the next segment, and the worker goes on. Where segments open while every worker is busy, one with
room is called back. Knows the scheduler, the study and the pool of workers by their interfaces, and no steps' costs.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from qlora_core.errors import SweepError
from qlora_core.sweep.pool import Outcome, WorkerPool
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.scheduler import Scheduler, Segment
from qlora_core.sweep.study import SweepStudy

WAIT_S = 1.0
"""Longest time a Ctrl-C may go unheard."""

_LOGGER = logging.getLogger(__name__)


class Host(Protocol):
    """What a cohort is a part of."""

    study: SweepStudy
    pack_size: int
    max_attempts: int
    max_preemptions: int

    def publish(self, record: TrialRecord) -> None:
        """Tell whoever watches where a trial stands."""
        ...


Draw = Callable[[], TrialRecord | None]
"""The next trial, already known to the scheduler; None when all have been drawn."""


class Cohort:
    """`records` by id, all known to `scheduler` unless they have failed. `draw` brings more where workers ask."""

    def __init__(
        self, host: Host, scheduler: Scheduler, records: Sequence[TrialRecord], draw: Draw | None = None
    ) -> None:
        self._host = host
        self._scheduler = scheduler
        self._records = {record.id: record for record in records}
        self._draw = draw
        self._held: dict[str, list[Segment]] = {}
        self._busy: dict[str, list[Segment]] = {}
        self._recalled: set[str] = set()

    def run(self, pool: WorkerPool) -> None:
        """Work until every trial of the cohort is finished."""
        known = list(self._scheduler.states)
        failed = [trial for trial in known if self._records[trial].error is not None]
        losses = {trial: self._records[trial].rung_losses for trial in known}
        self._scheduler.restore(losses, failed, {trial: self._records[trial].reached for trial in known})
        self._scheduler.take_changes()
        for record in self._records.values():
            record.state = self._scheduler.states.get(record.id, record.state)
            self._host.study.tell(record)
            self._host.publish(record)
        while not self._is_done:
            self._dispatch(pool)
            for outcome in pool.wait(WAIT_S):
                self._take(outcome)
        pool.expect(1)

    @property
    def _is_done(self) -> bool:
        return self._draw is None and self._scheduler.finished

    def _dispatch(self, pool: WorkerPool) -> None:
        idle = pool.idle()
        self._take_back_from_all_but(idle)
        if idle:
            self._draw_for(len(idle) * self._host.pack_size)
        kept = sum(len(self._held.get(worker, ())) for worker in idle)
        for place, worker in enumerate(idle):
            held = self._held.pop(worker, [])
            share = -(-(self._scheduler.open_segments + kept) // (len(idle) - place))
            kept -= len(held)
            pack = self._fill(held, min(self._host.pack_size, share))
            if pack:
                self._send(pool, worker, pack, new=pack[len(held) :])
        waiting = self._scheduler.open_segments
        pool.expect(len(self._busy) + math.ceil(waiting / self._host.pack_size))
        if waiting and not pool.idle():
            self._call_back(pool, waiting)

    def _take_back_from_all_but(self, idle: Sequence[str]) -> None:
        """A worker that was drained just as it came back is gone, and with it what it held: others go on with that."""
        for worker in self._held.keys() - set(idle):
            for segment in self._held.pop(worker):
                self._scheduler.release(segment.trial)

    def _draw_for(self, slots: int) -> None:
        while self._draw is not None and self._scheduler.open_segments < slots:
            record = self._draw()
            if record is None:
                self._draw = None
                self._take_changes()
                return
            self._records[record.id] = record
            self._host.study.tell(record)
            self._host.publish(record)

    def _fill(self, held: list[Segment], most: int) -> list[Segment]:
        """The segments a worker has, and others to train with them; all in one precision, for they share a base."""
        pack = list(held)
        while len(pack) < most and (segment := self._scheduler.next_segment()) is not None:
            if not self._fits(segment, pack):
                self._scheduler.release(segment.trial)
                break
            pack.append(segment)
            if self._records[segment.trial].alone:
                break
        return pack

    def _fits(self, segment: Segment, pack: Sequence[Segment]) -> bool:
        if not pack:
            return True
        record, first = self._records[segment.trial], self._records[pack[0].trial]
        return not record.alone and not first.alone and record.params["precision"] == first.params["precision"]

    def _send(self, pool: WorkerPool, worker: str, pack: list[Segment], new: Sequence[Segment]) -> None:
        records = [self._records[segment.trial] for segment in pack]
        for segment in new:
            record = self._records[segment.trial]
            record.worker, record.reached = worker, max(record.reached, segment.rung)
            # Before it is sent: a promotion that somebody may have acted on is never taken back.
            self._host.study.note_dispatch(record)
            _LOGGER.info("trial %s goes to %s, up to step %d", segment.trial, worker, segment.until_step)
        orders = [{"id": record.id, "params": record.params, "rungs": record.rungs} for record in records]
        self._busy[worker] = pack
        self._recalled.discard(worker)
        pool.submit(worker, pack, "run", orders, [segment.until_step for segment in pack])

    def _call_back(self, pool: WorkerPool, waiting: int) -> None:
        """Have workers with free slots come for the segments that wait, as many as those need."""
        peeked = self._scheduler.next_segment()
        if peeked is None:
            return
        self._scheduler.release(peeked.trial)
        for worker, pack in self._busy.items():
            room = self._host.pack_size - len(pack)
            if waiting <= 0:
                return
            if room > 0 and self._fits(peeked, pack):
                waiting -= room
                if worker not in self._recalled:
                    self._recalled.add(worker)
                    pool.recall(worker)

    def _take(self, outcome: Outcome) -> None:
        pack: list[Segment] = outcome.task
        self._busy.pop(outcome.worker, None)
        held: list[Segment] = []
        results: list[Any] = [None] * len(pack) if outcome.result is None else list(outcome.result)
        for segment, progress in zip(pack, results, strict=True):
            record = self._records[segment.trial]
            if progress is None:
                self._take_loss_of_worker(record, outcome, neighbours=len(pack) - 1)
            elif progress["error"] is not None:
                record.add_progress(progress)
                self._fail(record, progress["error"])
            elif progress.get("held"):
                record.add_progress(progress)
                held.append(segment)
            else:
                self._take_progress(record, segment, progress)
        if held:
            self._held[outcome.worker] = held
        changed = self._take_changes()
        for segment in pack:
            if segment.trial not in changed:
                self._host.publish(self._records[segment.trial])

    def _take_progress(self, record: TrialRecord, segment: Segment, progress: Mapping[str, Any]) -> None:
        record.add_progress(progress)
        loss, step = progress["validation_loss"], progress["step"]
        if progress["interrupted"]:
            self._host.study.save(record)
            self._scheduler.release(record.id)
        elif step != segment.until_step:
            self._fail(record, f"the worker ended at step {step} instead of {segment.until_step}")
        elif loss is None or not math.isfinite(loss):
            self._fail(record, f"the validation loss at step {step} is {loss}")
        else:
            self._host.study.save(record)
            self._host.study.tell(record)
            self._scheduler.report(record.id, loss)

    def _take_loss_of_worker(self, record: TrialRecord, outcome: Outcome, *, neighbours: int) -> None:
        """The call has no result: whose fault that is decides how often the trial may try again."""
        reason = outcome.error
        if outcome.preempted:
            record.preemptions += 1
            spent, budget, what = record.preemptions, self._host.max_preemptions, "its worker's node went away"
        elif outcome.died:
            record.deaths += 1
            record.alone = True
            spent, budget, what = record.deaths, self._host.max_attempts, "its worker died"
        elif neighbours:
            # One of the pack is to blame, and alone it will show which.
            record.alone = True
            spent, budget, what = 0, 1, "its pack ended"
        else:
            self._fail(record, str(reason))
            return
        if spent > budget:
            self._fail(record, f"{what} {spent} times, the last time with: {reason}")
            return
        _LOGGER.warning("trial %s: %s (%s); it goes on from its last checkpoint", record.id, what, reason)
        self._host.study.save(record)
        self._scheduler.release(record.id)

    def _fail(self, record: TrialRecord, error: str) -> None:
        record.error = error
        self._host.study.save(record)
        self._scheduler.fail(record.id)

    def _take_changes(self) -> list[str]:
        changed = self._scheduler.take_changes()
        for trial in changed:
            record = self._records[trial]
            record.state = self._scheduler.state_of(trial)
            self._host.study.tell(record)
            self._host.publish(record)
        return changed


def refused(record: TrialRecord, study: SweepStudy, error: SweepError) -> None:
    """Put on record that a trial cannot be: it fails alone, with the reason."""
    if record.state != "failed":
        record.error, record.state = str(error), "failed"
        study.save(record)
        study.tell(record)
