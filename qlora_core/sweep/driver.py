"""The trials of a sweep, cohort after cohort, until every one is finished; then the finalists' runs.

With synchronous halving nothing here depends on how many workers there are or how fast they are; that decides only how
soon the sweep ends. With asynchronous halving who is promoted does. Knows nothing of Ray or SQLite (the pool and the
study do) or of how a trial trains (the workers do).
"""

import itertools
import logging
from collections.abc import Callable

from qlora_core.config.sweep import FloatRange, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import SweepError
from qlora_core.sweep.asha import AsyncHalving
from qlora_core.sweep.brackets import Brackets, allot, bracket_shares
from qlora_core.sweep.cohort import Cohort, refused
from qlora_core.sweep.halving import Halving
from qlora_core.sweep.pool import WorkerPool
from qlora_core.sweep.prediction import predicted_work
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.rungs import TrialLength, plan_rungs, rungs_of
from qlora_core.sweep.scheduler import Scheduler
from qlora_core.sweep.space import cohort_size, trial_count, trial_params
from qlora_core.sweep.study import SweepStudy

OnTrial = Callable[[TrialRecord], None]
LengthOf = Callable[[TrainConfig], TrialLength]
SizeOf = Callable[[TrainConfig], int]
Rungs = dict[str, tuple[int, ...]]
_LENGTH_FIELDS = ("epochs", "max_steps", "micro_batch_size", "gradient_accumulation_steps")
_LOGGER = logging.getLogger(__name__)


class SweepDriver:
    """One sweep. `length_of`: a trial's steps, from its settings; `on_trial` gets the record of a trial that changed.

    A worker trains up to `pack_size` trials at a time; a trial whose worker died goes alone from then on, so that one
    that kills its worker takes no neighbour along twice. `length_of` raises SweepError for settings that cannot be.
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
        size_of: SizeOf | None = None,
    ) -> None:
        self.study = study
        self.pack_size = pack_size
        self.max_attempts = sweep.max_attempts
        self.max_preemptions = sweep.max_preemptions
        self._sweep = sweep
        self._train = train
        self._length_of = length_of
        self._size_of = size_of
        self._on_trial = on_trial

    def predicted(self) -> tuple[float, float]:
        """Optimizer steps and trained tokens that the sweep will take when nothing fails.

        Trials are counted as long as the `train` section as it stands; see `predicted_work`.
        """
        try:
            length = self._length_of(self._train)
        except SweepError:
            return 0.0, 0.0
        return predicted_work(self._sweep, length)

    def run(self, pool: WorkerPool) -> list[TrialRecord]:
        """Finish every trial of the sweep, from where an earlier driver had left it; the records in the order drawn."""
        count, pruning = trial_count(self._sweep), self._sweep.pruning
        if pruning.enabled and pruning.method == "asha" and count > 1:
            _Asynchronous(self, self._sweep, count).run(pool)
            return self.study.records(count)
        finished: list[TrialRecord] = []
        for first in range(0, count, cohort_size(self._sweep)):
            records = self.study.records(min(first + cohort_size(self._sweep), count))[first:]
            Cohort(self, self._halving(records), records).run(pool)
            finished.extend(records)
        return finished

    def run_to_end(self, pool: WorkerPool, records: list[TrialRecord]) -> None:
        """Train runs that are compared with nothing on the way."""
        lengths = self._lengths(records)
        ends = {trial: (length.total_steps,) for trial, length in lengths.items()}
        Cohort(self, Halving(ends, 2), records).run(pool)

    def length_of(self, record: TrialRecord) -> TrialLength:
        """Steps of a trial; SweepError when its point is no valid `train` section."""
        params = trial_params(self._train, {name: record.params[name] for name in {*self._sweep.space, "seed"}})
        if self._size_of is not None:
            record.adapter_parameters = self._size_of(params)
        return self._length_of(params)

    def longest(self) -> tuple[int, float]:
        """Upper bounds of the steps and of the trained tokens of any trial the space can give."""
        corners = {
            name: [values.low, values.high] if isinstance(values, FloatRange) else list(values)
            for name, values in self._sweep.space.items()
            if name in _LENGTH_FIELDS
        }
        lengths: list[TrialLength] = []
        for point in itertools.product(*corners.values()):
            drawn = {
                name: int(value) if name != "epochs" and value is not None else value
                for name, value in zip(corners, point, strict=True)
            }
            try:
                lengths.append(self._length_of(trial_params(self._train, drawn)))
            except SweepError:
                continue  # the trial that draws it says so
        steps = max((length.total_steps for length in lengths), default=1)
        return steps, max((length.total_tokens for length in lengths), default=1.0)

    def publish(self, record: TrialRecord) -> None:
        """Log where a trial stands and hand its row on."""
        loss = "no loss yet" if record.loss is None else f"loss {record.loss:.4f}"
        reason = f": {record.error}" if record.error else ""
        _LOGGER.info("trial %s %s at step %d, %s%s", record.id, record.state, record.steps, loss, reason)
        if self._on_trial is not None:
            self._on_trial(record)

    def _lengths(self, records: list[TrialRecord]) -> dict[str, TrialLength]:
        lengths: dict[str, TrialLength] = {}
        for record in records:
            try:
                lengths[record.id] = self.length_of(record)
            except SweepError as error:
                refused(record, self.study, error)
        return lengths

    def _halving(self, records: list[TrialRecord]) -> Scheduler:
        pruning = self._sweep.pruning
        rungs = plan_rungs(self._lengths(records), pruning)
        depth = len(next(iter(rungs.values()), ()))
        if not pruning.hyperband or depth < 2:
            return Halving(rungs, pruning.reduction_factor)
        shares = bracket_shares(depth, pruning.reduction_factor)
        chosen = allot(max(record.number for record in records) + 1, shares)
        parts = {record.id: chosen[record.number] for record in records if record.id in rungs}
        halvings = [
            Halving({t: rungs[t][b:] for t in rungs if parts[t] == b}, pruning.reduction_factor) for b in range(depth)
        ]
        return Brackets(parts, halvings)


class _Asynchronous:
    """All trials of a sweep under ASHA, drawn as workers ask for them."""

    def __init__(self, driver: SweepDriver, sweep: SweepConfig, count: int) -> None:
        self._driver = driver
        self._count = count
        self._pruning = sweep.pruning
        self._longest = driver.longest()
        self._next = 0
        depth = len(rungs_of(TrialLength(1, 0), self._pruning, *self._longest))
        shares = bracket_shares(depth, self._pruning.reduction_factor) if self._pruning.hyperband else [1.0]
        self._parts = allot(count, shares)
        self._scheduler = Brackets({}, [AsyncHalving({}, self._pruning.reduction_factor) for _ in shares])

    def run(self, pool: WorkerPool) -> None:
        """Work until every trial is finished; what was drawn before comes first."""
        drawn = [record for _ in range(self._driver.study.drawn) if (record := self._draw()) is not None]
        Cohort(self._driver, self._scheduler, drawn, self._draw).run(pool)

    def _draw(self) -> TrialRecord | None:
        if self._next >= self._count:
            self._scheduler.close()
            return None
        record = self._driver.study.records(self._next + 1)[self._next]
        self._next += 1
        try:
            length = self._driver.length_of(record)
        except SweepError as error:
            refused(record, self._driver.study, error)
            return record
        part = self._parts[record.number]
        self._scheduler.add(record.id, part, rungs_of(length, self._pruning, *self._longest)[part:])
        return record
