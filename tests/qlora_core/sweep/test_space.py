"""The search space: which points are drawn, that draws can be repeated, and what is refused."""

from pathlib import Path
from typing import Any, Literal

import pytest

from qlora_core.config.sweep import FloatRange, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import SweepError
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.space import cohort_size, grid_size, make_sampler, suggest, trial_count, trial_params
from qlora_core.sweep.study import open_study

LOG_RANGE = FloatRange(low=1e-5, high=1e-2, log=True)


def drawn(folder: Path, sweep: SweepConfig, count: int, batches: int = 1) -> list[dict[str, Any]]:
    """Params of `count` trials; the study is closed and opened again between `batches`."""
    per_batch = -(-count // batches)
    records: list[TrialRecord] = []
    for opened in range(batches):
        with open_study(folder / "study.db", sweep, TrainConfig(), {}) as study:
            records = study.records(min(count, per_batch * (opened + 1)))
    return [{name: record.params[name] for name in sweep.space} for record in records]


def test_no_space_is_one_trial_of_the_section_as_it_stands(tmp_path: Path) -> None:
    sweep = SweepConfig()
    assert trial_count(sweep) == 1
    with open_study(tmp_path / "study.db", sweep, TrainConfig(lora_rank=8), {}) as study:
        (record,) = study.records(1)
    assert record.id == "t000"
    assert record.params == TrainConfig(lora_rank=8).model_dump(mode="json")


def test_grid_visits_every_point_once(tmp_path: Path) -> None:
    sweep = SweepConfig(space={"learning_rate": [1e-4, 2e-4, 3e-4], "lora_rank": [4, 8]})
    points = drawn(tmp_path, sweep, trial_count(sweep))
    expected = {(rate, rank) for rate in (1e-4, 2e-4, 3e-4) for rank in (4, 8)}
    assert {(point["learning_rate"], point["lora_rank"]) for point in points} == expected
    assert len(points) == len(expected)


def test_grid_is_not_longer_than_its_distinct_points() -> None:
    assert grid_size({"lora_rank": [4, 8, 4]}) == 2
    assert trial_count(SweepConfig(space={"lora_rank": [4, 8, 4]}, trials=9)) == 2
    assert trial_count(SweepConfig(space={"lora_rank": [4, 8]}, trials=1)) == 1


def test_grid_takes_lists_of_module_names_as_values(tmp_path: Path) -> None:
    choices = ["all-linear", ["q_proj"], ["q_proj", "v_proj"]]
    points = drawn(tmp_path, SweepConfig(space={"target_modules": choices}), 3)
    assert sorted(points, key=str) == sorted(({"target_modules": choice} for choice in choices), key=str)


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
def test_draws_are_the_same_in_one_go_and_over_three_openings(
    tmp_path: Path, method: Literal["grid", "random", "tpe"]
) -> None:
    space = {"learning_rate": [1e-4, 2e-4, 3e-4], "lora_rank": [4, 8]}
    sweep = SweepConfig(method=method, space=space, trials=6, seed=3)
    assert drawn(tmp_path / "a", sweep, 6) == drawn(tmp_path / "b", sweep, 6, batches=3)


def test_random_draws_differ_by_seed_and_stay_in_range(tmp_path: Path) -> None:
    space: dict[str, Any] = {"learning_rate": LOG_RANGE, "lora_rank": FloatRange(low=3.2, high=9)}
    first, second = (
        drawn(tmp_path / str(seed), SweepConfig(method="random", space=space, seed=seed), 8) for seed in (0, 1)
    )
    assert first != second
    assert all(1e-5 <= point["learning_rate"] <= 1e-2 for point in first)
    assert {type(point["lora_rank"]) for point in first} == {int}
    assert {point["lora_rank"] for point in first} <= set(range(4, 10))
    assert len({point["learning_rate"] for point in first}) == 8


def test_a_parameter_half_drawn_is_finished_as_it_would_have_been(tmp_path: Path) -> None:
    sweep = SweepConfig(method="random", space={"learning_rate": LOG_RANGE, "lora_alpha": FloatRange(low=1, high=64)})
    whole = drawn(tmp_path / "whole", sweep, 1)
    with open_study(tmp_path / "cut" / "study.db", sweep, TrainConfig(), {}) as study:
        trial = study._study.ask()
        study._study.sampler = make_sampler(sweep, 0, "learning_rate")
        suggest(trial, "learning_rate", LOG_RANGE)
    assert drawn(tmp_path / "cut", sweep, 1) == whole


def test_tpe_learns_between_cohorts_whose_size_is_its_own() -> None:
    assert cohort_size(SweepConfig(method="tpe", space={"learning_rate": LOG_RANGE}, trials=40)) == 10
    assert cohort_size(SweepConfig(method="tpe", space={"learning_rate": LOG_RANGE}, trials=3)) == 3
    assert cohort_size(SweepConfig(method="random", space={"learning_rate": LOG_RANGE}, trials=40)) == 40


def test_tpe_moves_towards_what_did_well(tmp_path: Path) -> None:
    sweep = SweepConfig(method="tpe", space={"lora_alpha": FloatRange(low=1, high=101)}, trials=18)
    with open_study(tmp_path / "study.db", sweep, TrainConfig(), {}) as study:
        for count in range(6, 19, 6):
            for record in study.records(count)[count - 6 :]:
                record.loss, record.state = abs(record.params["lora_alpha"] - 20), "complete"
                study.save(record)
                study.tell(record)
        losses = [record.loss or 0.0 for record in study.records(18)]
    assert sum(losses[12:]) < sum(losses[:6]) / 2


def test_range_without_a_whole_number_is_refused_for_a_whole_field(tmp_path: Path) -> None:
    sweep = SweepConfig(method="random", space={"lora_rank": FloatRange(low=4.2, high=4.8)})
    with pytest.raises(SweepError, match=r"lora_rank.*4\.2 to 4\.8 holds no whole number"):
        drawn(tmp_path, sweep, 1)


def test_range_over_a_field_without_numbers_is_refused(tmp_path: Path) -> None:
    sweep = SweepConfig(method="random", space={"schedule": FloatRange(low=0, high=1)})
    with pytest.raises(SweepError, match="list its values"):
        drawn(tmp_path, sweep, 1)


def test_bad_point_is_refused_with_field_and_value() -> None:
    with pytest.raises(SweepError, match=r"lora_rank: .*1024.*drawn: \{'lora_rank': 5000\}"):
        trial_params(TrainConfig(), {"lora_rank": 5000})
    assert trial_params(TrainConfig(lora_alpha=4), {"lora_rank": 5}) == TrainConfig(lora_alpha=4, lora_rank=5)
