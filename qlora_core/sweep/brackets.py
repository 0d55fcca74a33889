"""Hyperband (Li et al. 2018): trials divided among brackets of successive halving whose first rung is later and later.

One bracket bets on many trials judged early, the last on few that are never judged before their end; so a space whose
good points start slowly is not lost. Each bracket is a scheduler of its own and keeps its promises. Knows no steps.
"""

from collections.abc import Iterable, Mapping, Sequence

from qlora_core.sweep.asha import AsyncHalving
from qlora_core.sweep.halving import Halving
from qlora_core.sweep.scheduler import Segment, TrialState


def bracket_shares(rungs: int, reduction_factor: int) -> list[float]:
    """The share of the trials in bracket b, which skips the first b of `rungs` rungs.

    Hyperband gives n_s = ceil((s_max + 1) / (s + 1) eta^s) trials to the bracket with s halvings; here s is
    rungs - 1 - b and the shares are n_s over their sum, so that any number of trials can be divided.
    """
    weights = [reduction_factor**halvings / (halvings + 1) for halvings in range(rungs - 1, -1, -1)]
    return [weight / sum(weights) for weight in weights]


def allot(count: int, shares: Sequence[float]) -> list[int]:
    """The brackets of trials 0 to `count` - 1: each goes where most is missing of its share so far.

    So a trial's bracket depends on its number alone, and not on how many trials follow.
    """
    counts = [0] * len(shares)
    chosen: list[int] = []
    for drawn in range(count):
        chosen.append(max(range(len(shares)), key=lambda b: (shares[b] * (drawn + 1) - counts[b], -b)))
        counts[chosen[-1]] += 1
    return chosen


class Brackets:
    """Several schedulers as one. `parts`: for each trial the number of its scheduler among `schedulers`."""

    def __init__(self, parts: Mapping[str, int], schedulers: Sequence[Halving | AsyncHalving]) -> None:
        self._parts = dict(parts)
        self._schedulers = list(schedulers)

    def add(self, trial: str, part: int, steps: Sequence[int]) -> None:
        """One more trial for an asynchronous bracket; `steps` are that bracket's rungs."""
        scheduler = self._schedulers[part]
        if not isinstance(scheduler, AsyncHalving):
            raise TypeError(f"bracket {part} is a {type(scheduler).__name__}, which takes all its trials at once")
        self._parts[trial] = part
        scheduler.add(trial, steps)

    def close(self) -> None:
        """No trial will be added any more."""
        for scheduler in self._schedulers:
            if isinstance(scheduler, AsyncHalving):
                scheduler.close()

    @property
    def states(self) -> dict[str, TrialState]:
        """The state of every trial."""
        return {trial: state for scheduler in self._schedulers for trial, state in scheduler.states.items()}

    def state_of(self, trial: str) -> TrialState:
        """Whether a trial is complete, pruned, failed, or waits."""
        return self._of(trial).states[trial]

    @property
    def finished(self) -> bool:
        """Whether every bracket is."""
        return all(scheduler.finished for scheduler in self._schedulers)

    @property
    def open_segments(self) -> int:
        """How many segments could be dispatched now."""
        return sum(scheduler.open_segments for scheduler in self._schedulers)

    def next_segment(self) -> Segment | None:
        """From the bracket with the longest segments down, so that these do not come last. None: nothing to do now."""
        segments = (scheduler.next_segment() for scheduler in reversed(self._schedulers))
        return next((segment for segment in segments if segment is not None), None)

    def release(self, trial: str) -> None:
        """Give a dispatched segment back unfinished."""
        self._of(trial).release(trial)

    def report(self, trial: str, loss: float) -> None:
        """The loss of a trial at the rung it was due at."""
        self._of(trial).report(trial, loss)

    def fail(self, trial: str) -> None:
        """A trial that will never report again."""
        self._of(trial).fail(trial)

    def take_changes(self) -> list[str]:
        """The trials whose state has changed since the last call."""
        return [trial for scheduler in self._schedulers for trial in scheduler.take_changes()]

    def restore(
        self, results: Mapping[str, Mapping[int, float]], failed: Iterable[str], reached: Mapping[str, int]
    ) -> None:
        """Bring every bracket to where the records had brought it."""
        lost = set(failed)
        for number, scheduler in enumerate(self._schedulers):
            own = {trial: losses for trial, losses in results.items() if self._parts[trial] == number}
            scheduler.restore(own, lost & own.keys(), reached)

    def _of(self, trial: str) -> Halving | AsyncHalving:
        return self._schedulers[self._parts[trial]]
