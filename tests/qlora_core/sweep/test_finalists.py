"""Who wins: the front of several objectives, means over seeds with intervals, and the winner trained again alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.sweep import FinalistsConfig, PruningConfig, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.sweep.cost import actual_cost, predicted_cost
from qlora_core.sweep.driver import SweepDriver
from qlora_core.sweep.finalists import Finals, best_trial, front, mean_interval, ranked_trials
from qlora_core.sweep.pool import Outcome
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.rungs import TrialLength
from qlora_core.sweep.study import open_study

STEPS = 8


def trial(number: int, loss: float | None, size: int = 1, tokens: int = 1, state: str = "complete") -> TrialRecord:
    record = TrialRecord(f"t{number:03d}", {"seed": 0}, state=state, loss=loss, tokens=tokens)
    record.adapter_parameters = size
    return record


class InstantPool:
    """One worker whose trials end at once with what `loss_of` says; keeps the packs it was given."""

    def __init__(self, loss_of: Callable[[dict[str, Any]], float]) -> None:
        self._loss_of = loss_of
        self._done: list[Outcome] = []
        self.packs: list[list[str]] = []

    def idle(self) -> list[str]:
        return [] if self._done else ["worker-0"]

    def submit(self, worker: str, task: Any, method: str, *arguments: Any) -> None:
        orders, until = arguments
        self.packs.append([order["id"] for order in orders])
        results = [self._result(order, step) for order, step in zip(orders, until, strict=True)]
        self._done.append(Outcome(worker, task, results))

    def _result(self, order: dict[str, Any], step: int) -> dict[str, Any]:
        shown = {"id": order["id"], "step": step, "total_steps": STEPS, "curve": [], "tokens": 10 * step}
        counted = {"seconds": 1.0, "optimizer": "none", "error": None, "recoveries": [], "micro_batch_size": 1}
        return {**shown, **counted, "validation_loss": self._loss_of(order), "interrupted": False}

    def wait(self, timeout_s: float) -> list[Outcome]:
        done, self._done = self._done, []
        return done

    def recall(self, worker: str) -> None:
        raise AssertionError("there is nobody to call back")

    def expect(self, workers: int) -> None:
        pass


def test_the_front_holds_what_no_other_beats() -> None:
    records = [
        trial(0, 1.0, size=64),
        trial(1, 1.1, size=8),
        trial(2, 1.2, size=16),
        trial(3, 0.9, size=8, state="pruned"),
        trial(4, None, state="failed"),
    ]
    assert [record.id for record in front(records, ["loss", "adapter_size"])] == ["t000", "t001"]
    assert [record.id for record in front(records, ["loss"])] == ["t000"]
    assert front([], ["loss"]) == []


def test_a_smaller_adapter_wins_within_the_tolerance_only() -> None:
    records = [trial(0, 1.0, size=64), trial(1, 1.05, size=8)]
    objectives: Any = ["loss", "adapter_size"]
    strict, lenient = (SweepConfig(objectives=objectives, loss_tolerance=tolerance) for tolerance in (0.01, 0.1))
    assert [best.id for sweep in (strict, lenient) if (best := best_trial(records, sweep))] == ["t000", "t001"]
    assert best_trial([trial(0, None, state="failed")], strict) is None


def ranked(records: list[TrialRecord], sweep: SweepConfig, finals: dict[str, Any] | None, count: int) -> list[str]:
    best = best_trial(records, sweep) if finals is None else next(r for r in records if r.id == finals["best"])
    assert best is not None
    return [record.id for record in ranked_trials(records, sweep, finals, best, count)]


def test_candidates_are_the_best_complete_trials_best_first() -> None:
    losses = [1.3, 0.9, 1.1, 1.1]
    records = [trial(number, loss) for number, loss in enumerate(losses)]
    records += [trial(4, 0.1, state="pruned"), trial(5, None, state="failed")]
    assert ranked(records, SweepConfig(), None, 1) == ["t001"]
    assert ranked(records, SweepConfig(), None, 3) == ["t001", "t002", "t003"]
    assert ranked(records, SweepConfig(), None, 99) == ["t001", "t002", "t003", "t000"]


def test_finalists_stand_by_their_means_before_every_other_trial() -> None:
    records = [trial(number, loss) for number, loss in enumerate([0.9, 1.0, 1.1, 1.2])]
    finalists = [{"trial": "t000", "mean": 1.4}, {"trial": "t001", "mean": 1.05}, {"trial": "t002", "mean": 1.3}]
    finals = {"finalists": finalists, "best": "t001"}
    assert ranked(records, SweepConfig(), finals, 4) == ["t001", "t002", "t000", "t003"]


def test_with_several_objectives_every_next_candidate_is_chosen_as_the_best_was() -> None:
    # Within the tolerance of the lowest loss left the smallest goes first: 1.05 (8), then 1.0 (64), then 1.2 (16)
    records = [trial(0, 1.0, size=64), trial(1, 1.05, size=8), trial(2, 1.2, size=16)]
    objectives: Any = ["loss", "adapter_size"]
    assert ranked(records, SweepConfig(objectives=objectives, loss_tolerance=0.1), None, 3) == ["t001", "t000", "t002"]


def test_intervals_are_students() -> None:
    # t(0.975, 2) = 4.302652729911275 (tables; scipy): mean 2, s = 1, half = 4.302652729911275 / sqrt(3).
    mean, low, high = mean_interval([1.0, 2.0, 3.0], 0.95)
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.4841377118, 2 + 2.4841377118), abs=1e-9)
    assert mean_interval([1.5], 0.95) == (1.5, None, None)


def finals(tmp_path: Path, loss_of: Callable[[dict[str, Any]], float]) -> tuple[Any, Any, InstantPool]:
    settings = FinalistsConfig(count=2, seeds=3)
    sweep = SweepConfig(
        space={"learning_rate": [0.1, 0.2, 0.3, 0.4]}, finalists=settings, pruning=PruningConfig(enabled=False)
    )
    train = TrainConfig(seed=5)
    pool = InstantPool(loss_of)
    with open_study(tmp_path / "study.db", sweep, train, {}) as study:
        driver = SweepDriver(study, sweep, train, lambda _: TrialLength(STEPS, 0), None, pack_size=4)
        winner, kept = Finals(driver, sweep, settings).run(pool, driver.run(pool))
    json.dumps(kept, allow_nan=False)
    return winner, kept, pool


def loss_of(order: dict[str, Any]) -> float:
    """0.3 is lucky once, at its own seed; 0.2 is better on the whole."""
    base = {0.1: 3.0, 0.2: 1.0, 0.3: 1.2, 0.4: 4.0}[order["params"]["learning_rate"]]
    lucky = order["params"]["learning_rate"] == 0.3 and order["params"]["seed"] == 5
    return 0.9 if lucky else base + 0.01 * (order["params"]["seed"] - 5)


def test_the_mean_over_seeds_decides_and_the_winner_is_trained_again_alone(tmp_path: Path) -> None:
    winner, kept, pool = finals(tmp_path, loss_of)
    assert winner.params["learning_rate"] == 0.2
    lucky, steady = kept["finalists"]
    assert (lucky["losses"][0], lucky["mean"]) == (0.9, pytest.approx((0.9 + 1.21 + 1.22) / 3))
    assert steady["losses"] == pytest.approx([1.0, 1.01, 1.02])
    assert steady["low"] < steady["mean"] < steady["high"]
    assert kept["check"]["agrees"] and kept["check"]["difference"] == 0.0
    assert pool.packs[-1] == [kept["check"]["run"]["id"]]
    assert {run["params"]["seed"] for run in kept["runs"]} == {6, 7}
    # Again over the same study: nothing is trained twice.
    again, kept_again, idle_pool = finals(tmp_path, loss_of)
    assert (again.id, kept_again) == (winner.id, kept)
    assert idle_pool.packs == []


def test_a_winner_that_cannot_be_had_again_is_told(tmp_path: Path) -> None:
    def unsteady(order: dict[str, Any]) -> float:
        return loss_of(order) + (0.5 if int(order["id"][1:]) >= 8 else 0.0)

    _, kept, _ = finals(tmp_path, unsteady)
    assert not kept["check"]["agrees"]
    assert kept["check"]["difference"] == pytest.approx(0.5)


def test_costs_charge_pruned_and_failed_work_to_what_is_kept() -> None:
    records = [trial(0, 1.0), trial(1, 2.0, state="pruned"), trial(2, None, state="failed")]
    for record, seconds in zip(records, (1800.0, 900.0, 900.0), strict=True):
        record.seconds, record.steps = seconds, 10
    spent = actual_cost(records, 4.0)
    assert (spent["busy_seconds"], spent["cost"], spent["cost_per_promoted_adapter"]) == (3600.0, 4.0, 4.0)
    assert spent["by_state"]["failed"] == {"trials": 1, "steps": 10, "tokens": 1, "seconds": 900.0}
    assert actual_cost([], None)["cost"] is None
    assert predicted_cost(10, 1000, 0.36, 10.0)["cost"] == 1.0
    assert predicted_cost(10, 1000, None, 10.0)["worker_seconds"] is None
