"""Asynchronous successive halving, ASHA (Li et al. 2020, algorithm 2): a state machine without input or output.

When a worker asks for work it gets, from the deepest rung down, a trial among the best `floor(n / reduction_factor)` of
the n that have reported at its rung; where there is none, one that has not begun. No worker ever waits for a report,
and a trial that was not promoted may be later, when more have reported. Once nobody can come to a rung any more, its
best `ceil(n / reduction_factor)` have gone on, as in synchronous halving, and the others are pruned.

Who is promoted depends on the order of reports, and so on how many workers there are and how fast they are. What holds:
a promotion is never taken back; at every rung at least as many go on as in synchronous halving of those that came
there; the trial with the lowest loss at every rung reaches the end; the same records give the same state.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qlora_core.sweep.scheduler import RungScheduler, Segment

_Entry = tuple[float, int, str]


@dataclass
class _Rung:
    """`ranked`: all that reported. `paused`: those of them that wait here. `coming`: trials due here."""

    ranked: list[_Entry] = field(default_factory=list)
    paused: list[_Entry] = field(default_factory=list)
    coming: int = 0


class AsyncHalving(RungScheduler):
    """One set of trials, which may grow with `add` until `close`. `rungs` as for `Halving`; it may be empty."""

    def __init__(self, rungs: Mapping[str, Sequence[int]], reduction_factor: int) -> None:
        super().__init__(reduction_factor)
        self._rungs: list[_Rung] = []
        self._settled = 0  # rungs under this one can get no more trials, and have let go all they will
        self._closed = False
        for trial, steps in rungs.items():
            self.add(trial, steps)

    def add(self, trial: str, steps: Sequence[int]) -> None:
        """One more trial, as many rungs as the others."""
        if not self._rungs:
            self._rungs = [_Rung() for _ in steps]
        self._rungs[0].coming += 1
        self._begin(trial, steps)

    def close(self) -> None:
        """No trial will be added any more."""
        self._closed = True
        self._settle()

    @property
    def finished(self) -> bool:
        """Whether every trial is complete, pruned or failed, and none will be added."""
        return self._closed and self._waiting == 0

    @property
    def open_segments(self) -> int:
        """How many segments could be dispatched now."""
        return len(self._open) + sum(self._promotable(rung) for rung in self._rungs[:-1])

    def next_segment(self) -> Segment | None:
        """Promote the best that can be, from the deepest rung down; else what was begun or has not begun. None: none.

        A trial that stands at its end already is promoted without a segment.
        """
        for number in range(len(self._rungs) - 2, -1, -1):
            while self._promotable(self._rungs[number]):
                trial = self._rungs[number].paused[0][2]
                self._promote(trial)
                if (segment := self._open.take_of(trial)) is not None:
                    return segment
        return self._open.take()

    def restore(
        self, results: Mapping[str, Mapping[int, float]], failed: Iterable[str], reached: Mapping[str, int]
    ) -> None:
        """Bring fresh trials to where recorded losses, promotions and failures had brought them, in any order."""
        lost = set(failed)
        for trial, losses in results.items():
            while (segment := self.due(trial)) is not None and segment.until_step in losses:
                self._enter(trial, losses[segment.until_step])
                if reached.get(trial, 0) > segment.rung and self.states[trial] == "waiting":
                    self._promote(trial)
            if trial in lost and self.states[trial] == "waiting":
                self._finish(trial, "failed")
                if self._reported[trial] < self._position[trial]:
                    self._enter(trial, math.inf)
        self._settle()

    def _enter(self, trial: str, loss: float) -> None:
        number = self._position[trial]
        rung = self._rungs[number]
        entry = (loss, self._order[trial], trial)
        insort(rung.ranked, entry)
        rung.coming -= 1
        self._reported[trial] = number
        self._open.discard(trial)
        if self.states[trial] != "waiting":
            return
        if number == len(self._rungs) - 1:
            self._finish(trial, "complete")
        else:
            insort(rung.paused, entry)

    def _promotable(self, rung: _Rung) -> int:
        return self._paused_within(rung, len(rung.ranked) // self._factor)

    def _paused_within(self, rung: _Rung, quota: int) -> int:
        """How many of the best `quota` of a rung are paused."""
        return bisect_right(rung.paused, rung.ranked[quota - 1]) if 0 < quota <= len(rung.ranked) else 0

    def _promote(self, trial: str) -> None:
        number = self._position[trial]
        rung = self._rungs[number]
        place = next(place for place, entry in enumerate(rung.paused) if entry[2] == trial)
        loss, _, _ = rung.paused.pop(place)
        self._position[trial] = number + 1
        self._rungs[number + 1].coming += 1
        if self._steps[trial][number + 1] == self._steps[trial][number]:
            self._enter(trial, loss)
        else:
            self._offer(trial)

    def _settle(self) -> None:
        """Let rungs that nobody can come to any more send on the rest of their share, and prune who is left."""
        while self._closed and self._settled < len(self._rungs) - 1 and not self._rungs[self._settled].coming:
            rung = self._rungs[self._settled]
            for _, _, trial in rung.paused[: self._paused_within(rung, math.ceil(len(rung.ranked) / self._factor))]:
                self._promote(trial)
            for _, _, trial in list(rung.paused):
                at_its_end = self._steps[trial][self._settled] == self._steps[trial][-1]
                self._finish(trial, "complete" if at_its_end else "pruned")
            rung.paused.clear()
            self._settled += 1
