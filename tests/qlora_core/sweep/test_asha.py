"""Asynchronous halving and Hyperband's brackets: no waiting, nothing taken back, the best comes through."""

import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.sweep.asha import AsyncHalving
from qlora_core.sweep.brackets import Brackets, allot, bracket_shares
from qlora_core.sweep.halving import Halving
from qlora_core.sweep.scheduler import Scheduler, Segment

RUNGS = (2, 4, 8)


def asha(count: int, factor: int = 2) -> AsyncHalving:
    made = AsyncHalving({f"t{number:03d}": RUNGS for number in range(count)}, factor)
    made.close()
    return made


def simulate(scheduler: Scheduler, losses: Mapping[str, float], workers: int, order: random.Random) -> dict[str, int]:
    """Run segments on `workers`, ending in random order; returns how often each trial and rung was run."""
    running: list[Segment] = []
    runs: dict[str, int] = {}
    while not scheduler.finished:
        while len(running) < workers and (segment := scheduler.next_segment()) is not None:
            running.append(segment)
        segment = running.pop(order.randrange(len(running)))
        if order.random() < 0.1:
            scheduler.release(segment.trial)
            continue
        name = f"{segment.trial} {segment.until_step}"
        runs[name] = runs.get(name, 0) + 1
        if losses[segment.trial] == math.inf:
            scheduler.fail(segment.trial)
        else:
            scheduler.report(segment.trial, losses[segment.trial])
    return runs


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.one_of(st.integers(0, 9).map(float), st.just(math.inf)), min_size=1, max_size=14),
    factor=st.integers(2, 4),
    workers=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_the_best_reaches_the_end_and_nothing_runs_twice_whatever_the_order(
    values: list[float], factor: int, workers: int, seed: int
) -> None:
    losses = {f"t{number:03d}": value for number, value in enumerate(values)}
    scheduler = asha(len(values), factor)
    runs = simulate(scheduler, losses, workers, random.Random(seed))
    assert set(runs.values()) == {1}
    finite = [trial for trial in losses if losses[trial] < math.inf]
    assert {trial for trial, state in scheduler.states.items() if state == "failed"} == losses.keys() - set(finite)
    if finite:
        best = min(finite, key=lambda trial: (losses[trial], trial))
        assert scheduler.states[best] == "complete"
    reached = [sum(1 for name in runs if name.endswith(f" {step}")) for step in RUNGS]
    # At least the share of synchronous halving goes on, and failed ones never do.
    assert reached[1] >= min(len(finite), math.ceil(reached[0] / factor)) or len(finite) < len(values)


def test_a_worker_that_asks_never_waits_while_trials_are_left() -> None:
    scheduler = asha(8)
    first = scheduler.next_segment()
    assert first == Segment("t000", 0, 2)
    scheduler.report("t000", 1.0)
    # One report is half a trial's share: nobody can be promoted, so a new trial begins.
    assert scheduler.next_segment() == Segment("t001", 0, 2)
    scheduler.report("t001", 2.0)
    assert scheduler.next_segment() == Segment("t000", 1, 4)


def test_a_trial_that_was_passed_over_is_promoted_when_others_turn_out_worse() -> None:
    scheduler = asha(4)
    for trial, loss in (("t000", 2.0), ("t001", 1.0)):
        scheduler.next_segment()
        scheduler.report(trial, loss)
    assert scheduler.next_segment() == Segment("t001", 1, 4)
    for trial, loss in (("t002", 3.0), ("t003", 4.0)):
        scheduler.next_segment()
        scheduler.report(trial, loss)
    assert scheduler.next_segment() == Segment("t000", 1, 4)


def test_promotions_on_record_are_not_taken_back() -> None:
    scheduler = asha(4)
    losses = {"t000": {2: 5.0}, "t001": {2: 1.0}, "t002": {}, "t003": {}}
    # t000 was let go on to the second rung when it was alone; today it would not be.
    scheduler.restore(losses, [], {"t000": 1, "t001": 0, "t002": 0, "t003": 0})
    assert scheduler.due("t000") == Segment("t000", 1, 4)
    assert scheduler.due("t001") is None and scheduler.states["t001"] == "waiting"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), stop_after=st.integers(0, 20))
def test_restored_it_stands_where_the_records_end(seed: int, stop_after: int) -> None:
    order = random.Random(seed)
    losses = {f"t{number:03d}": order.random() for number in range(9)}
    first = asha(9)
    results: dict[str, dict[int, float]] = {trial: {} for trial in losses}
    reached = dict.fromkeys(losses, 0)
    running: list[Segment] = []
    for _ in range(stop_after):
        if (segment := first.next_segment()) is not None:
            running.append(segment)
            reached[segment.trial] = segment.rung
        if running:
            ended = running.pop(order.randrange(len(running)))
            results[ended.trial][ended.until_step] = losses[ended.trial]
            first.report(ended.trial, losses[ended.trial])
    second = asha(9)
    second.restore(results, [], reached)
    assert second.states == first.states
    assert [second.due(trial) for trial in losses] == [first.due(trial) for trial in losses]


def test_trials_may_come_later_and_it_ends_only_when_closed() -> None:
    scheduler = AsyncHalving({}, 2)
    assert not scheduler.finished
    scheduler.add("t000", (1, 2))
    assert scheduler.next_segment() == Segment("t000", 0, 1)
    scheduler.report("t000", 1.0)
    assert scheduler.next_segment() is None and not scheduler.finished
    scheduler.close()
    assert scheduler.next_segment() == Segment("t000", 1, 2)
    scheduler.report("t000", 1.0)
    assert scheduler.finished


def test_hyperband_gives_most_trials_to_the_bracket_that_judges_first() -> None:
    # eta = 3, R = 27 units: Li et al. 2018, table 1 has n = 27, 9 (of 12 before rounding), 6, 4 for s = 3..0 at B = 4R;
    # the formula's n_s are 4/4 27, 4/3 9, 4/2 3, 4/1 1 = 27, 12, 6, 4.
    assert bracket_shares(4, 3) == pytest.approx([27 / 49, 12 / 49, 6 / 49, 4 / 49])
    chosen = allot(49, bracket_shares(4, 3))
    assert [chosen.count(bracket) for bracket in range(4)] == [27, 12, 6, 4]
    assert allot(10, bracket_shares(4, 3)) == chosen[:10]


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_synchronous_brackets_do_not_depend_on_the_workers(workers: int) -> None:
    losses = {f"t{number:03d}": float((number * 7) % 13) for number in range(12)}
    chosen = allot(12, bracket_shares(3, 2))
    parts = {trial: chosen[number] for number, trial in enumerate(losses)}

    def run(many: int, seed: int) -> dict[str, str]:
        halvings = [Halving({t: RUNGS[b:] for t in losses if parts[t] == b}, 2) for b in range(3)]
        brackets = Brackets(parts, halvings)
        simulate(brackets, losses, many, random.Random(seed))
        return dict(brackets.states)

    assert run(workers, workers) == run(1, 0)


def test_a_synchronous_bracket_takes_no_trial_later() -> None:
    with pytest.raises(TypeError, match="takes all its trials at once"):
        Brackets({}, [Halving({}, 2)]).add("t000", 0, (1, 2))
