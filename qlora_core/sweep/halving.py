"""Successive halving over one cohort of trials (Jamieson and Talwalkar 2016): a state machine without input or output.

At each rung the best `ceil(n / reduction_factor)` of the n trials that reached it go on; the rest are pruned. Ties go
to the trial drawn first. A failed trial counts as the worst of its rung.

Why not Optuna's SuccessiveHalvingPruner: it is asynchronous and judges a trial against those that happen to have
reported before it, so its result depends on the number of workers and on their speed. Here the set of survivors is
that of synchronous halving whatever the order of reports. It is still not a barrier: a trial goes on, or is pruned,
as soon as no missing report can change that. `asha` is the one that trades this for never waiting.

A report costs a binary search and a shift in a sorted list, so that cohorts of many thousands stay cheap.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qlora_core.sweep.scheduler import RungScheduler, Segment


@dataclass
class _Rung:
    """`members`: how many trials came here, final once the rung below is decided. `ranked`: those that reported."""

    members: int = 0
    ranked: list[tuple[float, int, str]] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.members - len(self.ranked)


class Halving(RungScheduler):
    """One cohort. `rungs`: for each trial, in the order drawn, the steps it is compared at, equally many."""

    def __init__(self, rungs: Mapping[str, Sequence[int]], reduction_factor: int) -> None:
        super().__init__(reduction_factor)
        count = len(next(iter(rungs.values()))) if rungs else 0
        self._rungs = [_Rung(len(rungs) if rung == 0 else 0) for rung in range(count)]
        self._frontier = 0  # the rung that is being decided; those below are
        self._loss: dict[str, float] = {}
        for trial, steps in rungs.items():
            self._begin(trial, steps)

    @property
    def finished(self) -> bool:
        """Whether every trial is complete, pruned or failed."""
        return self._waiting == 0

    @property
    def open_segments(self) -> int:
        """How many segments could be dispatched now."""
        return len(self._open)

    def next_segment(self) -> Segment | None:
        """Take the next segment to dispatch: deepest rung first, then the order drawn. None: nothing to do now."""
        return self._open.take()

    def restore(
        self, results: Mapping[str, Mapping[int, float]], failed: Iterable[str], reached: Mapping[str, int]
    ) -> None:
        """Bring a fresh cohort to where the recorded losses and failures had brought it; decisions follow from them."""
        del reached
        replay(self, results, failed)

    def _enter(self, trial: str, loss: float) -> None:
        number = self._position[trial]
        rung = self._rungs[number]
        entry = (loss, self._order[trial], trial)
        insort(rung.ranked, entry)
        self._reported[trial], self._loss[trial] = number, loss
        self._open.discard(trial)
        if number == len(self._rungs) - 1:
            if self.states[trial] == "waiting":
                self._finish(trial, "complete")
        elif number == self._frontier:
            self._decide_after(rung, entry)

    def _decide_after(self, rung: _Rung, entry: tuple[float, int, str]) -> None:
        """What one more report decides: one trial may fall out, and one place becomes certain."""
        keep = self._kept_of(rung)
        place = bisect_left(rung.ranked, entry)
        out = max(place, keep)
        if out < len(rung.ranked):
            self._drop(rung.ranked[out][2])
        certain = keep - rung.missing
        for rank in {place, certain - 1}:
            if 0 <= rank < min(certain, len(rung.ranked)):
                self._promote(rung.ranked[rank][2])

    def _settle(self) -> None:
        while self._frontier < len(self._rungs) - 1 and not self._rungs[self._frontier].missing:
            # The next rung's size is known only now that this one is decided, and with it who survives there.
            self._frontier += 1
            if self._frontier < len(self._rungs) - 1:
                self._decide_all(self._rungs[self._frontier])

    def _decide_all(self, rung: _Rung) -> None:
        keep = self._kept_of(rung)
        certain = keep - rung.missing
        for rank, (_, _, trial) in enumerate(list(rung.ranked)):
            if rank >= keep:
                self._drop(trial)
            elif rank < certain:
                self._promote(trial)

    def _kept_of(self, rung: _Rung) -> int:
        return math.ceil(rung.members / self._factor)

    def _drop(self, trial: str) -> None:
        rung = self._position[trial]
        if self.states[trial] == "waiting" and rung == self._frontier:
            at_its_end = self._steps[trial][rung] == self._steps[trial][-1]
            self._finish(trial, "complete" if at_its_end else "pruned")

    def _promote(self, trial: str) -> None:
        rung = self._position[trial]
        if self.states[trial] != "waiting" or rung != self._frontier:
            return
        self._position[trial] = rung + 1
        self._rungs[rung + 1].members += 1
        if self._steps[trial][rung + 1] == self._steps[trial][rung]:
            self._enter(trial, self._loss[trial])
        else:
            self._offer(trial)


def replay(halving: Halving, results: Mapping[str, Mapping[int, float]], failed: Iterable[str]) -> None:
    """Bring a fresh cohort to where the recorded losses (trial -> step -> loss) and failures had brought it."""
    lost = set(failed)
    moved = True
    while moved:
        moved = False
        for trial, losses in results.items():
            segment = halving.due(trial)
            if segment is None:
                continue
            if segment.until_step in losses:
                halving.report(trial, losses[segment.until_step])
                moved = True
            elif trial in lost:
                halving.fail(trial)
                moved = True
