"""What decides which trial is trained how far: the interface of all schedulers, and the segments they hand out.

A scheduler is a state machine without input or output. Knows nothing of workers, files or how a trial trains.
"""

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

TrialState = Literal["waiting", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class Segment:
    """A piece of work for a worker: train `trial` up to `until_step`, where rung number `rung` stands."""

    trial: str
    rung: int
    until_step: int


class Scheduler(Protocol):
    """Hands out segments and takes in their losses, until every trial is complete, pruned or failed."""

    @property
    def states(self) -> Mapping[str, TrialState]:
        """The state of every trial."""
        ...

    def state_of(self, trial: str) -> TrialState:
        """Whether a trial is complete, pruned, failed, or waits."""
        ...

    @property
    def finished(self) -> bool:
        """Whether every trial is complete, pruned or failed."""
        ...

    @property
    def open_segments(self) -> int:
        """How many segments could be dispatched now."""
        ...

    def next_segment(self) -> Segment | None:
        """Take the next segment to dispatch; None: nothing to do now."""
        ...

    def release(self, trial: str) -> None:
        """Give a dispatched segment back unfinished, to be taken again."""
        ...

    def report(self, trial: str, loss: float) -> None:
        """The loss (nats per token, finite) of a trial at the end of the segment it was dispatched with."""
        ...

    def fail(self, trial: str) -> None:
        """A trial that will never report again."""
        ...

    def take_changes(self) -> list[str]:
        """The trials whose state has changed since the last call."""
        ...

    def restore(
        self, results: Mapping[str, Mapping[int, float]], failed: Iterable[str], reached: Mapping[str, int]
    ) -> None:
        """Bring a fresh scheduler to where recorded losses (trial -> step -> loss) and failures had brought it.

        `reached`: the deepest rung each trial was dispatched to; what was decided once stays decided.
        """
        ...


class OpenSegments:
    """Segments that wait to be dispatched, the deepest rung first and then in the order of the trials' places."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Segment]] = []
        self._ticket = itertools.count()
        self._live: dict[str, Segment] = {}

    def __len__(self) -> int:
        return len(self._live)

    def add(self, segment: Segment, place: int) -> None:
        """Let a segment wait; one of the same trial that waits already is replaced."""
        self._live[segment.trial] = segment
        heapq.heappush(self._heap, (-segment.rung, place, next(self._ticket), segment))

    def discard(self, trial: str) -> None:
        """Forget a trial's segment; no effect where none waits."""
        self._live.pop(trial, None)

    def take(self) -> Segment | None:
        """Remove and return the first; None when none waits."""
        while self._heap:
            *_, segment = heapq.heappop(self._heap)
            if self._live.get(segment.trial) is segment:
                return self._live.pop(segment.trial)
        return None

    def take_of(self, trial: str) -> Segment | None:
        """Remove and return the segment of one trial; None where none waits."""
        return self._live.pop(trial, None)


class RungScheduler(ABC):
    """What schedulers over rungs share: where each trial stands, what waits to be dispatched, what has changed.

    How a report is judged is the subclass's: `_enter` takes one in, `_settle` draws what follows from it.
    """

    def __init__(self, reduction_factor: int) -> None:
        self._factor = reduction_factor
        self._steps: dict[str, tuple[int, ...]] = {}
        self._order: dict[str, int] = {}
        self._position: dict[str, int] = {}
        self._reported: dict[str, int] = {}
        self._open = OpenSegments()
        self._waiting = 0
        self._changed: list[str] = []
        self.states: dict[str, TrialState] = {}

    def due(self, trial: str) -> Segment | None:
        """The segment a trial needs next, dispatched or not; None when it is finished or awaits a decision."""
        rung = self._position[trial]
        if self.states[trial] != "waiting" or self._reported[trial] >= rung:
            return None
        return Segment(trial, rung, self._steps[trial][rung])

    def state_of(self, trial: str) -> TrialState:
        """Whether a trial is complete, pruned, failed, or waits."""
        return self.states[trial]

    def release(self, trial: str) -> None:
        """Give a dispatched segment back unfinished, to be taken again."""
        self._offer(trial)

    def report(self, trial: str, loss: float) -> None:
        """The loss (nats per token, finite) of a trial at the rung it was due at."""
        self._enter(trial, loss)
        self._settle()

    def fail(self, trial: str) -> None:
        """A trial that will never report again. It counts at its rung, as the worst."""
        self._finish(trial, "failed")
        self._enter(trial, math.inf)
        self._settle()

    def take_changes(self) -> list[str]:
        """The trials whose state has changed since the last call, in that order."""
        changed, self._changed = self._changed, []
        return changed

    @abstractmethod
    def _enter(self, trial: str, loss: float) -> None: ...

    @abstractmethod
    def _settle(self) -> None: ...

    def _begin(self, trial: str, steps: Iterable[int]) -> None:
        self._steps[trial] = tuple(steps)
        self._order[trial] = len(self._order)
        self._position[trial], self._reported[trial] = 0, -1
        self.states[trial] = "waiting"
        self._waiting += 1
        self._offer(trial)

    def _offer(self, trial: str) -> None:
        if (segment := self.due(trial)) is not None:
            self._open.add(segment, self._order[trial])

    def _finish(self, trial: str, state: TrialState) -> None:
        if self.states[trial] == "waiting":
            self._waiting -= 1
        self.states[trial] = state
        self._open.discard(trial)
        self._changed.append(trial)
