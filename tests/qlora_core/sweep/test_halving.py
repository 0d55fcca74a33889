"""Successive halving: who survives, whatever the order of reports, workers, deaths and resumes."""

import math
import random
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.sweep.halving import Halving, replay
from qlora_core.sweep.scheduler import Segment

RUNGS = (2, 4, 8)


def cohort(count: int, rungs: tuple[int, ...] = RUNGS, factor: int = 2) -> Halving:
    return Halving({f"t{number:03d}": rungs for number in range(count)}, factor)


def synchronous(losses: Mapping[str, float], rungs: int, factor: int) -> dict[str, str]:
    """Textbook halving with a barrier at each rung; a loss of infinity is a failure at the first rung."""
    states: dict[str, str] = {}
    members = list(losses)
    for rung in range(rungs):
        keep = math.ceil(len(members) / factor) if rung < rungs - 1 else len(members)
        ranked = sorted(members, key=lambda trial: (losses[trial], trial))
        states |= {trial: "failed" for trial in ranked if losses[trial] == math.inf}
        states |= {trial: "pruned" for trial in ranked[keep:] if losses[trial] < math.inf}
        members = [trial for trial in ranked[:keep] if losses[trial] < math.inf]
    return states | dict.fromkeys(members, "complete")


def simulate(halving: Halving, losses: Mapping[str, float], workers: int, order: random.Random) -> int:
    """Run segments on `workers`, ending in random order; returns how many were run."""
    running: list[Segment] = []
    done = 0
    while not halving.finished:
        while len(running) < workers and (segment := halving.next_segment()) is not None:
            running.append(segment)
        segment = running.pop(order.randrange(len(running)))
        if order.random() < 0.1:
            halving.release(segment.trial)
            continue
        done += 1
        if losses[segment.trial] == math.inf:
            halving.fail(segment.trial)
        else:
            halving.report(segment.trial, losses[segment.trial])
    return done


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.one_of(st.integers(0, 9).map(float), st.just(math.inf)), min_size=1, max_size=12),
    factor=st.integers(2, 4),
    workers=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_survivors_are_those_of_textbook_halving_whatever_the_workers(
    values: list[float], factor: int, workers: int, seed: int
) -> None:
    losses = {f"t{number:03d}": value for number, value in enumerate(values)}
    halving = cohort(len(values), factor=factor)
    simulate(halving, losses, workers, random.Random(seed))
    assert halving.states == synchronous(losses, len(RUNGS), factor)


def test_a_trial_is_pruned_as_soon_as_enough_others_are_better() -> None:
    halving = cohort(4)
    for trial, loss in (("t000", 3.0), ("t001", 1.0), ("t002", 2.0)):
        halving.report(trial, loss)
    assert halving.states["t000"] == "pruned"
    assert halving.states["t001"] == "waiting"


def test_a_trial_goes_on_as_soon_as_no_missing_report_can_stop_it() -> None:
    halving = cohort(4)
    for trial, loss in (("t000", 3.0), ("t001", 1.0), ("t002", 2.0)):
        halving.report(trial, loss)
    assert halving.due("t001") == Segment("t001", 1, 4)
    assert halving.due("t002") is None


def test_ties_go_to_the_trial_drawn_first() -> None:
    halving = cohort(2, rungs=(1, 2))
    halving.report("t001", 1.0)
    halving.report("t000", 1.0)
    assert halving.states == {"t000": "waiting", "t001": "pruned"}


def test_deeper_rungs_are_worked_on_first() -> None:
    halving = cohort(3, rungs=(1, 2))
    halving.report("t002", 1.0)
    halving.report("t001", 2.0)
    assert halving.next_segment() == Segment("t002", 1, 2)
    assert halving.next_segment() == Segment("t000", 0, 1)
    assert halving.next_segment() is None


def test_a_trial_at_its_end_is_complete_even_when_others_go_on() -> None:
    halving = Halving({"t000": (4, 4, 4), "t001": (4, 8, 16)}, 2)
    halving.report("t000", 2.0)
    halving.report("t001", 1.0)
    assert halving.states == {"t000": "complete", "t001": "waiting"}


def test_a_short_trial_stands_at_later_rungs_with_its_final_loss() -> None:
    halving = Halving({"t000": (4, 4, 4), "t001": (4, 8, 16), "t002": (4, 8, 16), "t003": (4, 8, 16)}, 2)
    for trial, loss in (("t000", 1.0), ("t001", 2.0), ("t002", 3.0), ("t003", 4.0)):
        halving.report(trial, loss)
    assert halving.due("t000") is None
    halving.report("t001", 1.5)
    assert halving.states["t001"] == "pruned"
    assert halving.states["t000"] == "complete"


def test_all_failing_leaves_nobody_and_ends() -> None:
    halving = cohort(3)
    for trial in list(halving.states):
        halving.fail(trial)
    assert halving.finished
    assert set(halving.states.values()) == {"failed"}


def test_an_empty_cohort_is_finished() -> None:
    assert Halving({}, 2).finished
    assert Halving({}, 2).next_segment() is None


@settings(max_examples=100, deadline=None)
@given(stop_after=st.integers(0, 12), seed=st.integers(0, 2**16))
def test_replay_goes_on_where_the_records_end(stop_after: int, seed: int) -> None:
    losses = {f"t{number:03d}": float(value) for number, value in enumerate((5, 3, 9, 1, 7))} | {"t005": math.inf}
    order = random.Random(seed)
    first = cohort(6)
    results: dict[str, dict[int, float]] = {trial: {} for trial in losses}
    failed: list[str] = []
    for _ in range(stop_after):
        due = [segment for trial in losses if (segment := first.due(trial)) is not None]
        if not due:
            break
        segment = order.choice(due)
        if losses[segment.trial] == math.inf:
            failed.append(segment.trial)
            first.fail(segment.trial)
        else:
            results[segment.trial][segment.until_step] = losses[segment.trial]
            first.report(segment.trial, losses[segment.trial])
    second = cohort(6)
    replay(second, results, failed)
    assert second.states == first.states
    assert [second.due(trial) for trial in losses] == [first.due(trial) for trial in losses]
    simulate(second, losses, 2, order)
    assert second.states == synchronous(losses, len(RUNGS), 2)
