"""A sweep that cannot fit is refused before a worker starts; one that can is planned from its largest trial."""

from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import DataError, TrainingError
from qlora_core.sweep.memory_check import (
    check_memory,
    execution_settings,
    largest_trial,
    longest_rows,
    pass_settings,
    plan_space,
    stored_format,
)
from qlora_core.sweep.run import SweepWork, run_sweep
from qlora_core.training.memory.plan import MemoryPlan

TRAIN = TrainConfig(lora_rank=4, micro_batch_size=2, max_steps=2)


def test_largest_trial_takes_the_worst_of_every_setting() -> None:
    space: dict[str, Any] = {
        "lora_rank": [8, 64, 16],
        "micro_batch_size": {"low": 1, "high": 8},
        "optimizer": ["paged_adamw_8bit", "lion"],
        "gradient_checkpointing": [True, False],
        "target_modules": [["q_proj"], "all-linear"],
        "learning_rate": [1e-3],
    }
    largest = largest_trial(SweepConfig(method="random", space=space), TRAIN)
    assert (largest.lora_rank, largest.micro_batch_size, largest.optimizer) == (64, 8, "lion")
    assert largest.gradient_checkpointing is False
    assert largest.target_modules == "all-linear"
    assert largest_trial(SweepConfig(), TRAIN) == TRAIN


def test_sweep_that_fits_is_planned(quantized: Path, curated: Path) -> None:
    plan = check_memory(SweepConfig(), TRAIN, ComputeConfig(workers=1), quantized, curated, most_workers=4)
    assert plan is not None
    assert plan.fits
    assert plan.residency == "dense"
    assert execution_settings(ComputeConfig(), plan)["residency"] == "auto"
    assert stored_format(quantized).blocksize == 64


def test_sweep_that_cannot_fit_is_refused_before_it_starts(quantized: Path, curated: Path, tmp_path: Path) -> None:
    huge = TRAIN.model_copy(update={"lora_rank": 10**9})
    work = SweepWork(quantized, curated, tmp_path / "work", {})
    with pytest.raises(TrainingError, match=r"needs \d+ bytes .* set train\.lora_rank: \d+"):
        run_sweep(SweepConfig(), huge, ComputeConfig(workers=1), work, tmp_path / "out")
    assert not work.study_file.exists()


def test_a_space_with_one_point_that_fits_is_planned_from_it(
    quantized: Path, curated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {rank: plan_for(rank, quantized, curated) for rank in (4, 1024)}
    between = (needed[4] + needed[1024]) // 2
    monkeypatch.setattr("qlora_core.sweep.memory_check.local_device", lambda: ("cpu", between))
    sweep = SweepConfig(space={"lora_rank": [1024, 4]})
    fixed = TRAIN.model_copy(update={"gradient_checkpointing": True, "micro_batch_size": 1})
    plan, refuse = plan_space(sweep, fixed, ComputeConfig(workers=1), quantized, curated, most_workers=1)
    assert plan is not None and plan.needed_bytes <= between
    assert refuse(fixed.model_copy(update={"lora_rank": 4})) is None
    assert "bytes" in str(refuse(fixed.model_copy(update={"lora_rank": 1024})))


def test_a_space_whose_every_point_is_refused_names_the_smallest_and_the_constraint(
    quantized: Path, curated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_core.sweep.memory_check.local_device", lambda: ("cpu", 1000))
    sweep = SweepConfig(space={"lora_rank": [1024, 8]})
    with pytest.raises(TrainingError, match=r"every point of sweep\.space is refused.*'lora_rank': 8.*needs \d+ bytes"):
        plan_space(sweep, TRAIN, ComputeConfig(workers=1), quantized, curated, most_workers=1)


def plan_for(rank: int, quantized: Path, curated: Path) -> int:
    params = TRAIN.model_copy(update={"lora_rank": rank, "gradient_checkpointing": True, "micro_batch_size": 1})
    plan = check_memory(SweepConfig(), params, ComputeConfig(workers=1), quantized, curated, most_workers=1)
    assert plan is not None
    return plan.needed_bytes


def test_sweep_that_fits_in_smaller_micro_batches_is_computed_in_them(quantized: Path, curated: Path) -> None:
    wide = TRAIN.model_copy(update={"micro_batch_size": 2**40, "gradient_accumulation_steps": 1})
    plan = check_memory(SweepConfig(), wide, ComputeConfig(workers=1), quantized, curated, most_workers=4)
    assert plan is not None and plan.fits
    limits = pass_settings(SweepConfig(), wide, plan)
    assert limits["most_rows"] == plan.micro_batch_size
    assert limits.get("recompute", False) == plan.gradient_checkpointing
    assert 1 <= limits["most_rows"] < 2**40
    assert pass_settings(SweepConfig(), TRAIN, plan_of(quantized, curated)) == {}


def plan_of(quantized: Path, curated: Path) -> MemoryPlan | None:
    return check_memory(SweepConfig(), TRAIN, ComputeConfig(workers=1), quantized, curated, most_workers=4)


def test_workers_elsewhere_are_not_judged_by_this_machine(quantized: Path, curated: Path) -> None:
    huge = TRAIN.model_copy(update={"micro_batch_size": 10**9})
    elsewhere = ComputeConfig(ray_address="ray://elsewhere:10001")
    assert check_memory(SweepConfig(), huge, elsewhere, quantized, curated, most_workers=4) is None


def test_longest_rows_of_no_curated_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="curated set"):
        longest_rows(tmp_path)
