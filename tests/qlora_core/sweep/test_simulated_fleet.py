"""The real driver over a simulated fleet: slots stay busy, no segment ends twice, preemptions change no result."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_core.config.sweep import PruningConfig

SIMULATION = Path(__file__).parents[3] / "benchmarks" / "sweep_simulation.py"


@pytest.fixture(scope="module")
def fleet() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_simulation", SIMULATION)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_simulation"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["halving", "asha"])
@pytest.mark.parametrize("pack_size", [1, 4])
def test_slots_stay_busy_while_there_is_work_and_nothing_ends_twice(
    fleet: ModuleType, tmp_path: Path, method: str, pack_size: int
) -> None:
    sweep = fleet.sweep_of(96, PruningConfig(method=method))  # type: ignore[arg-type]
    machines = fleet.Fleet(8, pack_size, mean_life_s=900.0, counts_driver=False, seed=3)
    pool, records = fleet.simulate(sweep, machines, tmp_path)
    figures = fleet.figures(pool, records)
    assert figures["preemptions"] > 3
    assert figures["busy_share_with_work"] >= 0.95
    assert figures["segments_finished_twice"] == 0
    assert figures["states"].keys() == {"complete", "pruned"}
    assert sum(figures["states"].values()) == 96


def test_synchronous_halving_ends_the_same_on_any_fleet(fleet: ModuleType, tmp_path: Path) -> None:
    sweep = fleet.sweep_of(40, PruningConfig())
    fleets = [
        fleet.Fleet(1, 1, counts_driver=False),
        fleet.Fleet(7, 1, mean_life_s=600.0, counts_driver=False, seed=1),
        fleet.Fleet(3, 8, mean_life_s=900.0, counts_driver=False, seed=2),
    ]
    results = []
    for number, machines in enumerate(fleets):
        (tmp_path / str(number)).mkdir()
        _, records = fleet.simulate(sweep, machines, tmp_path / str(number))
        results.append([(record.id, record.state, record.loss, record.rungs) for record in records])
    assert results[0] == results[1] == results[2]


def test_a_freed_slot_is_filled_while_its_neighbours_go_on(
    fleet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the control of a pool that comes back only when the whole pack is done."""
    sweep = fleet.sweep_of(60, PruningConfig(method="asha"))
    machines = fleet.Fleet(2, 4, counts_driver=False)
    (tmp_path / "refilled").mkdir()
    refilled, _ = fleet.simulate(sweep, machines, tmp_path / "refilled")

    class WholePacks(fleet.SimulatedPool):
        def submit(self, worker: str, task: object, method: str, *arguments: object) -> None:
            super().submit(worker, task, method, *arguments)
            found = self._workers[worker]
            longest = max(end - begun for begun, end in zip(found.begun, found.until, strict=True))
            self._schedule(self.now + longest * self._step_s(found), "done", found)

        def recall(self, worker: str) -> None:
            pass

    (tmp_path / "whole").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(fleet, "SimulatedPool", WholePacks)
        whole, _ = fleet.simulate(sweep, machines, tmp_path / "whole")
    assert refilled.saturated_busy_s / refilled.saturated_alive_s > 0.95
    assert refilled.now < whole.now


def test_what_a_worker_held_goes_on_elsewhere_when_it_is_gone_as_it_comes_back(
    fleet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call ended well, so that no outcome says that it is gone."""

    class Vanishing(fleet.SimulatedPool):
        vanished = 0

        def wait(self, timeout_s: float) -> list[Any]:
            assert self.now < 1e7, "the sweep waits for a worker that is gone"
            outcomes = super().wait(timeout_s)
            for outcome in outcomes:
                if self.vanished < 3 and any(row["held"] for row in outcome.result or ()):
                    self._preempt(self._workers[outcome.worker])
                    self.vanished += 1
            return outcomes

    sweep = fleet.sweep_of(40, PruningConfig())
    machines = fleet.Fleet(3, 4, counts_driver=False)
    found = []
    for name, pool_class in (("whole", fleet.SimulatedPool), ("vanishing", Vanishing)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(fleet, "SimulatedPool", pool_class)
        pool, records = fleet.simulate(sweep, machines, tmp_path / name)
        found.append([(record.id, record.state, record.loss, record.rungs) for record in records])
    assert pool.vanished == 3
    assert found[0] == found[1]
