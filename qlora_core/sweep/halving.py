"""Successive halving over one cohort of trials (Jamieson and Talwalkar 2016): a state machine without input or output.

At each rung the best `ceil(n / reduction_factor)` of the n trials that reached it go on; the rest are pruned. Ties go
to the trial drawn first. A failed trial counts as the worst of its rung.

Why not Optuna's SuccessiveHalvingPruner: it is asynchronous and judges a trial against those that happen to have
reported before it, so its result depends on the number of workers and on their speed. Here the set of survivors is
that of synchronous halving whatever the order of reports. It is still not a barrier: a trial goes on, or is pruned,
as soon as no missing report can change that.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

TrialState = Literal["waiting", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class Segment:
    """A piece of work for a worker: train `trial` up to `until_step`, where rung number `rung` stands."""

    trial: str
    rung: int
    until_step: int


class Halving:
    """One cohort. `rungs`: for each trial, in the order drawn, the steps it is compared at, equally many."""

    def __init__(self, rungs: Mapping[str, Sequence[int]], reduction_factor: int) -> None:
        self._rungs = {trial: tuple(steps) for trial, steps in rungs.items()}
        self._order = {trial: place for place, trial in enumerate(rungs)}
        self._factor = reduction_factor
        count = len(next(iter(self._rungs.values()))) if self._rungs else 0
        self._members: list[set[str]] = [set() for _ in range(count)]
        if count:
            self._members[0] = set(self._rungs)
        self._losses: list[dict[str, float]] = [{} for _ in range(count)]
        self._position = dict.fromkeys(self._rungs, 0)
        self._running: set[str] = set()
        self.states: dict[str, TrialState] = dict.fromkeys(self._rungs, "waiting")

    @property
    def finished(self) -> bool:
        """Whether every trial is complete, pruned or failed."""
        return all(state != "waiting" for state in self.states.values())

    def due(self, trial: str) -> Segment | None:
        """The segment a trial needs next, dispatched or not; None when it is finished or awaits a decision."""
        rung = self._position[trial]
        if self.states[trial] != "waiting" or trial in self._losses[rung]:
            return None
        return Segment(trial, rung, self._rungs[trial][rung])

    @property
    def open_segments(self) -> int:
        """How many segments could be dispatched now."""
        return len(self._open())

    def _open(self) -> list[Segment]:
        return [
            segment for trial in self._rungs if trial not in self._running and (segment := self.due(trial)) is not None
        ]

    def next_segment(self) -> Segment | None:
        """Take the next segment to dispatch: deepest rung first, then the order drawn. None: nothing to do now."""
        waiting = self._open()
        if not waiting:
            return None
        chosen = min(waiting, key=lambda segment: (-segment.rung, self._order[segment.trial]))
        self._running.add(chosen.trial)
        return chosen

    def release(self, trial: str) -> None:
        """Give a dispatched segment back unfinished, to be taken again."""
        self._running.discard(trial)

    def report(self, trial: str, loss: float) -> None:
        """The loss (nats per token, finite) of a trial at the rung it was due at."""
        self._running.discard(trial)
        self._enter(trial, loss)
        self._settle()

    def fail(self, trial: str) -> None:
        """A trial that will never report again. It keeps its place in its rung, as the worst."""
        self._running.discard(trial)
        self.states[trial] = "failed"
        self._losses[self._position[trial]][trial] = math.inf
        self._settle()

    def _enter(self, trial: str, loss: float) -> None:
        rung = self._position[trial]
        self._losses[rung][trial] = loss
        if rung == len(self._losses) - 1:
            self.states[trial] = "complete"

    def _settle(self) -> None:
        for rung in range(len(self._losses) - 1):
            missing = len(self._members[rung]) - len(self._losses[rung])
            self._decide(rung, missing)
            if missing:
                # The next rung's size is not known before this one is decided, and so neither is who survives there.
                return

    def _decide(self, rung: int, missing: int) -> None:
        keep = math.ceil(len(self._members[rung]) / self._factor)
        losses = self._losses[rung]
        ranked = sorted(losses, key=lambda trial: (losses[trial], self._order[trial]))
        for rank, trial in enumerate(ranked):
            if self.states[trial] != "waiting" or self._position[trial] != rung:
                continue
            if rank >= keep:
                at_its_end = self._rungs[trial][rung] == self._rungs[trial][-1]
                self.states[trial] = "complete" if at_its_end else "pruned"
            elif rank + missing < keep:
                self._promote(trial, rung + 1)

    def _promote(self, trial: str, rung: int) -> None:
        self._position[trial] = rung
        self._members[rung].add(trial)
        if self._rungs[trial][rung] == self._rungs[trial][rung - 1]:
            self._enter(trial, self._losses[rung - 1][trial])


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
