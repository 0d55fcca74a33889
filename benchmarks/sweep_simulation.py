"""The real scheduler over a simulated fleet: 256 workers, 10,000 trials, nodes that are preempted.

Driver, cohorts, halving and the study in SQLite are the ones that sweeps run with. Only the workers are simulated, as
events on a clock: a pack of k trials takes k passes' worth of time for a step of each, a preempted worker loses what it
has not checkpointed and its node comes back later, and a trial's loss falls along a curve of its own. The driver's own
time is real and stands still for nobody: while it thinks, the simulated workers go on.
"""

import heapq
import itertools
import logging
import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_core.config.sweep import FloatRange, PruningConfig, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.sweep.driver import SweepDriver
from qlora_core.sweep.pool import Outcome
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.rungs import TrialLength
from qlora_core.sweep.study import open_study

TOTAL_STEPS = 100
CHECKPOINT_EVERY = 10
STEP_S = 3.0
"""Of one trial alone, as an 8B model takes on one GPU for 64k tokens."""


@dataclass
class Fleet:
    """The simulated machines. `mean_life_s`: until a worker's node is preempted, exponential; None: never."""

    workers: int
    pack_size: int = 1
    mean_life_s: float | None = None
    return_s: float = 120.0
    load_s: float = 30.0
    seed: int = 0
    counts_driver: bool = True


@dataclass
class _Worker:
    name: str
    ready: bool = False
    task: Any = None
    orders: Sequence[Mapping[str, Any]] = ()
    until: Sequence[int] = ()
    begun: list[float] = field(default_factory=list)
    since: float = 0.0
    ticket: int = 0


class SimulatedPool:
    """A `WorkerPool` on a clock of its own. `busy_s`, `alive_s`: slot-seconds; `steps`: what was really trained."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.now = self.busy_s = self.alive_s = self.driver_s = 0.0
        self.saturated_busy_s = self.saturated_alive_s = 0.0
        self.preemptions = self.steps = self.repeated_steps = self.calls = 0
        self.finished: list[tuple[str, int]] = []
        self._reached: dict[str, float] = {}
        self._kept: dict[str, float] = {}
        self._random = random.Random(fleet.seed)
        self._events: list[tuple[float, int, str, str, int]] = []
        self._order = itertools.count()
        self._workers: dict[str, _Worker] = {}
        self._names = (f"worker-{number}" for number in itertools.count())
        self._left = time.perf_counter()
        self._wants_more = True
        for _ in range(fleet.workers):
            self._join(0.0)

    def idle(self) -> list[str]:
        """Workers that wait for work."""
        return [name for name, worker in self._workers.items() if worker.ready and worker.task is None]

    def submit(self, worker: str, task: Any, method: str, *arguments: Any) -> None:
        """Begin a call of `run`; time passes in `wait`."""
        if method != "run":
            raise ValueError(f"a simulated worker only runs, it cannot {method}")
        found = self._workers[worker]
        orders, until = arguments
        found.task, found.orders, found.until, found.since = task, orders, until, self.now
        found.begun = [self._reached.get(order["id"], self._kept.get(order["id"], 0.0)) for order in orders]
        self.calls += 1
        shortest = min(max(0.0, end - begun) for begun, end in zip(found.begun, until, strict=True))
        self._schedule(self.now + shortest * self._step_s(found), "done", found)

    def recall(self, worker: str) -> None:
        """The call ends at once, with whatever was done by now."""
        self._schedule(self.now, "done", self._workers[worker])

    def expect(self, workers: int) -> None:
        """Note whether work waits for a worker; a simulated fleet stays as large as it is."""
        self._wants_more = workers > len(self._workers)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Let time pass until something ends, or for `timeout_s`."""
        took = time.perf_counter() - self._left
        self.driver_s += took
        if self.fleet.counts_driver:
            self._pass_to(self.now + took)
        deadline = self.now + timeout_s
        outcomes: list[Outcome] = []
        while self._events and (not outcomes or self._events[0][0] <= self.now):
            if self._events[0][0] > deadline:
                break
            at, _, what, name, ticket = heapq.heappop(self._events)
            self._pass_to(max(at, self.now))
            outcomes += self._happen(what, name, ticket)
        if not outcomes:
            self._pass_to(max(self.now, deadline))
        self._left = time.perf_counter()
        return outcomes

    def _happen(self, what: str, name: str, ticket: int) -> list[Outcome]:
        worker = self._workers.get(name)
        if what == "join":
            self._join(self.fleet.load_s)
        elif worker is not None and what == "ready":
            worker.ready = True
        elif worker is not None and what == "gone":
            return self._preempt(worker)
        elif worker is not None and what == "done" and worker.task is not None and ticket == worker.ticket:
            return [self._finish(worker)]
        return []

    def _finish(self, worker: _Worker) -> Outcome:
        results = []
        for order, begun, end in zip(worker.orders, worker.begun, worker.until, strict=True):
            step = min(float(end), begun + (self.now - worker.since) / self._step_s(worker))
            done = end - step < 1e-6
            step = float(end) if done else step
            self._count(order["id"], begun, step)
            self._reached[order["id"]] = step
            self._kept[order["id"]] = step if done else max(self._kept.get(order["id"], 0.0), _saved(step))
            if done:
                self.finished.append((order["id"], end))
            results.append(self._progress(order, step, done=done))
        task, worker.task = worker.task, None
        return Outcome(worker.name, task, results)

    def _preempt(self, worker: _Worker) -> list[Outcome]:
        self.preemptions += 1
        del self._workers[worker.name]
        heapq.heappush(self._events, (self.now + self.fleet.return_s, next(self._order), "join", "", 0))
        if worker.task is None:
            return []
        for order, begun, end in zip(worker.orders, worker.begun, worker.until, strict=True):
            step = min(float(end), begun + (self.now - worker.since) / self._step_s(worker))
            self._count(order["id"], begun, step)
            self._kept[order["id"]] = max(self._kept.get(order["id"], 0.0), _saved(step))
            self.repeated_steps += math.floor(step - self._kept[order["id"]])
            self._reached.pop(order["id"], None)
        return [Outcome(worker.name, worker.task, error="its node is gone", died=True, preempted=True)]

    def _count(self, trial: str, begun: float, step: float) -> None:
        self.steps += math.floor(step) - math.floor(begun)

    def _progress(self, order: Mapping[str, Any], step: float, *, done: bool) -> dict[str, Any]:
        return {
            "id": order["id"],
            "step": math.floor(step),
            "total_steps": TOTAL_STEPS,
            "curve": [],
            "validation_loss": _loss(order, step) if done else None,
            "tokens": math.floor(step) * 1000,
            "seconds": 0.0,
            "optimizer": "simulated",
            "error": None,
            "recoveries": [],
            "micro_batch_size": 1,
            "interrupted": not done,
            "held": not done,
        }

    def _step_s(self, worker: _Worker) -> float:
        return STEP_S * len(worker.orders)

    def _join(self, load_s: float) -> None:
        worker = _Worker(next(self._names))
        self._workers[worker.name] = worker
        self._schedule(self.now + load_s, "ready", worker)
        if self.fleet.mean_life_s is not None:
            life = self._random.expovariate(1 / self.fleet.mean_life_s)
            heapq.heappush(self._events, (self.now + load_s + life, next(self._order), "gone", worker.name, 0))

    def _schedule(self, at: float, what: str, worker: _Worker) -> None:
        worker.ticket += 1
        heapq.heappush(self._events, (at, next(self._order), what, worker.name, worker.ticket))

    def _pass_to(self, moment: float) -> None:
        span = moment - self.now
        busy = sum(len(worker.orders) for worker in self._workers.values() if worker.task is not None) * span
        alive = sum(worker.ready for worker in self._workers.values()) * self.fleet.pack_size * span
        self.busy_s, self.alive_s = self.busy_s + busy, self.alive_s + alive
        if self._wants_more:
            self.saturated_busy_s += busy
            self.saturated_alive_s += alive
        self.now = moment


def _saved(step: float) -> float:
    return float(math.floor(step) // CHECKPOINT_EVERY * CHECKPOINT_EVERY)


def _loss(order: Mapping[str, Any], step: float) -> float:
    """A power law towards a floor that depends on the rate, with noise of the trial's own."""
    rate = order["params"]["learning_rate"]
    floor = 1.5 + 0.2 * abs(math.log10(rate) + 3.5)
    noise = random.Random(f"{order['id']} {round(step)}").gauss(0.0, 0.01)
    return floor + 1.5 * max(step, 1.0) ** -0.5 + noise


def sweep_of(trials: int, pruning: PruningConfig) -> SweepConfig:
    """A random search over the learning rate."""
    space: dict[str, Any] = {"learning_rate": FloatRange(low=1e-5, high=1e-2, log=True)}
    return SweepConfig(method="random", space=space, trials=trials, pruning=pruning, max_preemptions=1000)


def simulate(sweep: SweepConfig, fleet: Fleet, folder: Path) -> tuple[SimulatedPool, list[TrialRecord]]:
    """A whole sweep over the fleet, its study in `folder`."""
    train = TrainConfig()
    with open_study(folder / "study.db", sweep, train, {}) as study:
        pool = SimulatedPool(fleet)
        driver = SweepDriver(
            study, sweep, train, lambda _: TrialLength(TOTAL_STEPS, 0), None, pack_size=fleet.pack_size
        )
        return pool, driver.run(pool)


def figures(pool: SimulatedPool, records: Sequence[TrialRecord]) -> dict[str, Any]:
    """What became of it; `busy_share_with_work` leaves out the end, when there is less work than workers."""
    states = [record.state for record in records]
    return {
        "states": {state: states.count(state) for state in sorted(set(states))},
        "best_loss": min(record.loss for record in records if record.state == "complete" and record.loss is not None),
        "simulated_hours": pool.now / 3600,
        "busy_share": pool.busy_s / pool.alive_s,
        "busy_share_with_work": pool.saturated_busy_s / max(pool.saturated_alive_s, 1e-9),
        "preemptions": pool.preemptions,
        "steps": pool.steps,
        "repeated_steps": pool.repeated_steps,
        "calls": pool.calls,
        "segments_finished_twice": len(pool.finished) - len(set(pool.finished)),
        "driver_seconds": pool.driver_s,
        "driver_ms_per_call": 1000 * pool.driver_s / max(pool.calls, 1),
    }


def measure(workers: int = 256, trials: int = 10_000) -> dict[str, Any]:
    """Busy shares and the driver's own cost for synchronous and asynchronous halving, with preemptions."""
    ways = {"asha": PruningConfig(method="asha"), "halving": PruningConfig()}
    logging.getLogger("qlora_core").setLevel(logging.ERROR)  # every preemption is a warning there
    found: dict[str, Any] = {}
    for name, pruning in ways.items():
        fleet = Fleet(workers, mean_life_s=2 * 3600)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = figures(*simulate(sweep_of(trials, pruning), fleet, Path(folder)))
    return {"workers": workers, "trials": trials, "step_seconds": STEP_S, "total_steps": TOTAL_STEPS, **found}
