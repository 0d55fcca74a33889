"""Schedules against their closed forms, and the number of steps."""

import math

import pytest

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError
from qlora_core.training.schedule import SCHEDULES, learning_rate, rate_multiplier, total_steps, warmup_steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_evenly_to_the_full_rate_under_every_schedule(schedule: str) -> None:
    values = [rate_multiplier(schedule, step, 100, 4) for step in range(5)]
    assert values == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0], abs=1e-15)


@pytest.mark.parametrize("step", [10, 37, 80, 99, 100])
def test_schedules_after_warmup_follow_their_formulas(step: int) -> None:
    total, warmup = 100, 10
    assert rate_multiplier("constant", step, total, warmup) == 1.0
    assert rate_multiplier("linear", step, total, warmup) == pytest.approx(1 - (step - 10) / 90, abs=1e-15)
    assert rate_multiplier("cosine", step, total, warmup) == pytest.approx(
        math.cos(math.pi * (step - 10) / 180) ** 2, abs=1e-15
    )
    assert rate_multiplier("wsd", step, total, warmup) == pytest.approx(min(1, (100 - step) / 20), abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (3, 0), (17, 16), (50, 5)])
def test_every_step_taken_has_a_positive_rate_of_at_most_one(schedule: str, total: int, warmup: int) -> None:
    values = [rate_multiplier(schedule, step, total, warmup) for step in range(total)]
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1.0
    assert rate_multiplier(schedule, total, total, warmup) == (1.0 if schedule == "constant" else pytest.approx(0.0))


def test_learning_rate_scales_the_multiplier() -> None:
    params = TrainConfig(learning_rate=0.5, schedule="linear", warmup_ratio=0.25)
    assert [learning_rate(params, step, 4) for step in range(4)] == pytest.approx([0.25, 0.5, 1 / 3, 1 / 6])


@pytest.mark.parametrize(
    ("schedule", "step", "total", "warmup"),
    [("cosin", 0, 4, 0), ("linear", 5, 4, 0), ("linear", -1, 4, 0), ("wsd", 0, 4, 4)],
)
def test_what_lies_outside_a_schedule_is_refused(schedule: str, step: int, total: int, warmup: int) -> None:
    with pytest.raises(TrainingError, match=f"{schedule}|step {step} of {total} with {warmup}"):
        rate_multiplier(schedule, step, total, warmup)


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"), [(32, 1.0, 2), (33, 1.0, 3), (33, 2.0, 6), (480, 0.1, 3), (5, 0.01, 1), (5, 3.0, 3)]
)
def test_total_steps_counts_epochs_and_rounds_up(rows: int, epochs: float, steps: int) -> None:
    assert total_steps(TrainConfig(micro_batch_size=4, gradient_accumulation_steps=4, epochs=epochs), rows) == steps


def test_max_steps_overrides_epochs() -> None:
    assert total_steps(TrainConfig(max_steps=7, epochs=100.0), 1) == 7


def test_no_rows_have_no_steps() -> None:
    with pytest.raises(TrainingError, match="0 training rows"):
        total_steps(TrainConfig(), 0)


@pytest.mark.parametrize(
    ("ratio", "total", "warmup"), [(0.03, 100, 3), (0.03, 10, 1), (0.03, 1, 0), (0.0, 50, 0), (0.99, 5, 4)]
)
def test_warmup_steps_leave_at_least_one_full_step(ratio: float, total: int, warmup: int) -> None:
    assert warmup_steps(TrainConfig(warmup_ratio=ratio), total) == warmup
