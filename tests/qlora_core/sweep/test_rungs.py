"""Where rungs stand."""

import pytest

from qlora_core.config.sweep import PruningConfig
from qlora_core.sweep.rungs import TrialLength, expected_steps, plan_rungs


def lengths(*totals: int, warmup: int = 0) -> dict[str, TrialLength]:
    return {f"t{place:03d}": TrialLength(total, warmup) for place, total in enumerate(totals)}


@pytest.mark.parametrize(
    ("total", "pruning", "rungs"),
    [
        (100, PruningConfig(), (25, 50, 100)),
        (100, PruningConfig(reduction_factor=3), (25, 75, 100)),
        (100, PruningConfig(reduction_factor=4), (25, 100)),
        (100, PruningConfig(min_steps=10), (10, 20, 40, 80, 100)),
        (100, PruningConfig(min_steps=100), (100,)),
        (100, PruningConfig(min_steps=1000), (100,)),
        (100, PruningConfig(enabled=False), (100,)),
        (1, PruningConfig(), (1, 1, 1)),
    ],
)
def test_rungs_of_two_equal_trials(total: int, pruning: PruningConfig, rungs: tuple[int, ...]) -> None:
    assert plan_rungs(lengths(total, total), pruning) == {"t000": rungs, "t001": rungs}


def test_a_lone_trial_is_not_interrupted() -> None:
    assert plan_rungs(lengths(100), PruningConfig()) == {"t000": (100,)}
    assert plan_rungs({}, PruningConfig()) == {}


def test_no_rung_stands_inside_warm_up() -> None:
    assert plan_rungs(lengths(100, 100, warmup=60), PruningConfig())["t000"] == (61, 61, 100)
    assert plan_rungs(lengths(100, 100, warmup=99), PruningConfig())["t000"] == (100, 100, 100)


def test_trials_of_different_length_have_equally_many_rungs() -> None:
    shares = plan_rungs(lengths(100, 40), PruningConfig())
    assert shares == {"t000": (25, 50, 100), "t001": (10, 20, 40)}
    steps = plan_rungs(lengths(100, 15), PruningConfig(min_steps=10))
    assert steps == {"t000": (10, 20, 40, 80, 100), "t001": (10, 15, 15, 15, 15)}


def test_expected_steps_of_four_trials_halved() -> None:
    # 4 trials to 25, 2 on to 50, 1 on to 100: 100 + 50 + 50.
    assert expected_steps(plan_rungs(lengths(100, 100, 100, 100), PruningConfig()), 2) == 200
    assert expected_steps(plan_rungs(lengths(100, 100), PruningConfig(enabled=False)), 2) == 200
    assert expected_steps({}, 2) == 0
