"""CMA-ES as a sampler: reproducible from records alone, towards what did well, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_core.config.sweep import FloatRange, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.sweep.space import cohort_size
from qlora_core.sweep.study import SweepStudy, open_study

SPACE: dict[str, Any] = {
    "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
    "lora_alpha": FloatRange(low=1, high=101),
    "lora_rank": FloatRange(low=4, high=64),
    "use_rslora": [False, True],
}


def sweep_of(trials: int) -> SweepConfig:
    return SweepConfig(method="cmaes", space=SPACE, trials=trials, seed=5)


def finish(study: SweepStudy, count: int, size: int) -> list[float]:
    """Draw and finish `count` trials, generation after generation; the distances from the best point."""
    for first in range(0, count, size):
        for record in study.records(min(count, first + size))[first:]:
            if record.state == "waiting":
                record.loss, record.state = abs(record.params["lora_alpha"] - 20) / 100, "complete"
                record.rungs = [{"step": 1, "loss": record.loss}]
                study.save(record)
                study.tell(record)
    return [record.loss or 0.0 for record in study.records(count)]


def test_generations_move_towards_what_did_well(tmp_path: Path) -> None:
    alone = SweepConfig(method="cmaes", space={"lora_alpha": SPACE["lora_alpha"]}, trials=40, seed=5)
    with open_study(tmp_path / "study.db", alone, TrainConfig(), {}) as study:
        losses = finish(study, 40, cohort_size(alone))
    assert sum(losses[30:]) < sum(losses[:10]) / 2


def test_points_are_in_their_ranges_and_lists(tmp_path: Path) -> None:
    sweep = sweep_of(16)
    with open_study(tmp_path / "study.db", sweep, TrainConfig(), {}) as study:
        finish(study, 16, cohort_size(sweep))
        params = [record.params for record in study.records(16)]
    assert {type(point["lora_rank"]) for point in params} == {int}
    assert all(4 <= point["lora_rank"] <= 64 and 1e-5 <= point["learning_rate"] <= 1e-1 for point in params)
    assert {point["use_rslora"] for point in params} == {False, True}


def test_a_driver_that_goes_on_draws_what_the_first_would_have(tmp_path: Path) -> None:
    sweep = sweep_of(16)
    with open_study(tmp_path / "whole.db", sweep, TrainConfig(), {}) as study:
        finish(study, 16, 4)
        whole = [record.params for record in study.records(16)]
    for until in (3, 8, 13, 16):
        with open_study(tmp_path / "cut.db", sweep, TrainConfig(), {}) as study:
            finish(study, until, 4)
    with open_study(tmp_path / "cut.db", sweep, TrainConfig(), {}) as study:
        assert [record.params for record in study.records(16)] == whole


def test_nothing_in_the_study_is_a_pickle(tmp_path: Path) -> None:
    sweep = sweep_of(12)
    with open_study(tmp_path / "study.db", sweep, TrainConfig(), {}) as study:
        finish(study, 12, 4)
        kept = [trial.system_attrs for trial in study._study.get_trials()]
    assert kept == [{}] * 12


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"space": {"lora_rank": [4, 8]}}, "searches ranges"),
        ({"pruning": {"method": "asha"}}, "whole generations"),
        ({"objectives": ["loss", "tokens"]}, "one objective"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SweepConfig(**{"method": "cmaes", "space": SPACE, "trials": 8, **settings})
