"""A sweep from its config to its result: the best trial's adapter, and a row for every trial.

May be interrupted at any point, by Ctrl-C or by killing any of its processes: the same call with the same `work_dir`
goes on where it was. With a store it goes on with an empty `work_dir` too, on any machine: the study, which is kept
nowhere else, is drawn again, since every draw follows from the sweep's seed and earlier results, and each trial goes on
from its checkpoint in the store. Knows where things are kept; the driver knows the loop, the cluster the workers.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.sweep import WITHOUT_EFFECT, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import SweepError
from qlora_core.sweep.adapter_card import write_adapter_card
from qlora_core.sweep.cluster import MOST_CPU_WORKERS, Cluster
from qlora_core.sweep.cost import actual_cost, cost_line, predicted_cost, seconds_per_token
from qlora_core.sweep.driver import SweepDriver
from qlora_core.sweep.finalists import Finals, best_trial, front, ranked_trials
from qlora_core.sweep.keeper import work_name
from qlora_core.sweep.live_table import SweepView, live_table
from qlora_core.sweep.lock import DRIVER_LOCK, OTHER_DRIVER_S, exclusive_lock
from qlora_core.sweep.memory_check import (
    Refuse,
    execution_settings,
    lora_shape,
    mean_tokens,
    pass_settings,
    plan_record,
    plan_space,
)
from qlora_core.sweep.pack_size import pack_size
from qlora_core.sweep.pool import Outcome
from qlora_core.sweep.ray_connection import ray_connection
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.rungs import TrialLength
from qlora_core.sweep.space import cohort_size, trial_count
from qlora_core.sweep.speed import note_speed, speed_key
from qlora_core.sweep.study import STUDY, SweepStudy, open_study, set_aside
from qlora_core.sweep.trial_length import trained_rows
from qlora_core.sweep.worker import SweepWorker
from qlora_core.training.memory.machine import local_device
from qlora_core.training.memory.parts import adapter_sizes
from qlora_core.training.memory.plan import MemoryPlan
from qlora_core.training.memory.shapes import read_shapes
from qlora_core.training.step_tail import StepTail, copy_diaries

STEPS = "steps"
"""In a sweep's result, the folder of its step diaries."""

OnRow = Callable[[dict[str, Any]], None]
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepWork:
    """Where a sweep finds its inputs and keeps its state.

    `work_dir` is durable, and every worker sees it: `study.db`, checkpoints in `trials/<id>/`. `lineage` names what the
    adapter is bound to (see `adapter_card.LINEAGE`); the digests in it tell this sweep from others.

    `store` are the arguments of `open_store`, as JSON data: there each trial's newest checkpoint is kept too, under the
    name of `work_dir`, which must be the sweep's own. None keeps them in `work_dir` alone. `lease` is the name of the
    lease under which the sweep runs, `inputs` the digests of the artifacts it is made from. `original_folder` is the
    checkpoint that the base was quantized from, where it is at hand: starts that need it are refused without.
    """

    quantized_folder: Path
    curated_folder: Path
    work_dir: Path
    lineage: Mapping[str, str]
    store: Mapping[str, Any] | None = None
    lease: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    original_folder: Path | None = None
    start_folder: Path | None = None
    """The PEFT folder that every trial begins from; None: from scratch."""
    parent_folder: Path | None = None
    """The PEFT folder that stays as it is under every trial; None: the base alone."""

    @property
    def kept(self) -> dict[str, Any] | None:
        """Where the checkpoints are kept beside `work_dir`, for `SweepWorker`."""
        if self.store is None:
            return None
        name = work_name(self.work_dir)
        return {"store": dict(self.store), "name": name, "lease": self.lease, "inputs": dict(self.inputs)}

    @property
    def study_file(self) -> Path:
        """The Optuna study; only the driver opens it."""
        return self.work_dir / "study.db"

    def study_in(self, sweep: SweepConfig) -> tuple[Path | str, str]:
        """Where the study is, and its name there: a file of its own, or the sweep's name in a shared database."""
        return (self.study_file, STUDY) if sweep.storage is None else (sweep.storage, self.work_dir.name)

    @property
    def trials_dir(self) -> Path:
        """Checkpoints, a folder per trial."""
        return self.work_dir / "trials"


def run_sweep(
    sweep: SweepConfig,
    train: TrainConfig,
    compute: ComputeConfig,
    work: SweepWork,
    out: Path,
    on_trial: OnRow | None = None,
) -> dict[str, Any]:
    """Train the sweep's trials and write `sweep.json` and `adapter/` (the best trial's PEFT folder) into `out`.

    Where the sweep has several candidates, `adapters/<trial>/` has the PEFT folder of each, the best one's too.
    `steps/<trial>/steps.jsonl` has what every step of a trial cost (see `training.step_log`).

    `on_trial` is called in this process with a trial's row as in `sweep.json` whenever the trial changed, and once
    for each trial when it is taken up again after an interruption (`state` is "waiting" until it is finished).

    Returns what `sweep.json` holds: `method`, `varied` (names in the search space), `trials`, `best` (a trial's id),
    `candidates` (ids of the exported trials, best first), `objectives` and `front` (ids of trials no other beats in all
    of them), `finals` (see `Finals.run`; None without finalists), `cost` (`predicted` and `actual`, see `cost`),
    `memory` (how the largest trial was planned to run and why; None where the workers are elsewhere).
    Raises SweepError when no trial finished, listing every trial's error; the next call then tries all of them again;
    and, before anything is loaded, when the study cannot be written. Raises TrainingError, before anything is loaded,
    when no trial fits this machine's memory, and LeaseLostError when another machine has taken the sweep over.
    """
    with exclusive_lock(work.work_dir / DRIVER_LOCK, purpose="this sweep runs already", wait_s=OTHER_DRIVER_S):
        planned = _plan(sweep, train, compute, work)
        where, name = work.study_in(sweep)
        with open_study(where, sweep, train, _identity(sweep, train, work.lineage), name) as study:
            found = _Run(sweep, train, compute, work, study, on_trial).run(*planned)
        if found.best is None:
            kept = set_aside(where, name, "failed")
            errors = "; ".join(f"{record.id}: {record.error}" for record in found.records)
            raise SweepError(f"none of {len(found.records)} trials finished: {errors} (the study is kept as {kept})")
        summary = found.summary(sweep)
        _copy_adapters(work, found.candidates, out)
        copy_diaries(work.trials_dir, [record.id for record in found.records], out / STEPS)
        (out / "sweep.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        if sweep.storage is not None:
            # The checkpoints go once this is stored; a study that speaks of them must not be taken up again.
            set_aside(where, name, "done")
        return summary


@dataclass(frozen=True)
class _Result:
    records: list[TrialRecord]
    candidates: list[TrialRecord]
    finals: dict[str, Any] | None
    cost: dict[str, Any]
    memory: dict[str, Any] | None

    @property
    def best(self) -> TrialRecord | None:
        """The winner; None where no trial finished."""
        return self.candidates[0] if self.candidates else None

    def summary(self, sweep: SweepConfig) -> dict[str, Any]:
        """What `sweep.json` holds."""
        return {
            "method": sweep.method,
            "varied": sorted(sweep.space),
            "trials": [record.row() for record in self.records],
            "best": None if self.best is None else self.best.id,
            "candidates": [record.id for record in self.candidates],
            "objectives": list(sweep.objectives),
            "front": [record.id for record in front(self.records, sweep.objectives)],
            "finals": self.finals,
            "cost": self.cost,
            "memory": self.memory,
        }


class _Run:
    """One call of `run_sweep`, its study open."""

    def __init__(
        self,
        sweep: SweepConfig,
        train: TrainConfig,
        compute: ComputeConfig,
        work: SweepWork,
        study: SweepStudy,
        on_trial: OnRow | None,
    ) -> None:
        self._sweep, self._train, self._compute, self._work = sweep, train, compute, work
        self._study = study
        self._on_trial = on_trial
        self._rate: float | None = None

    def run(self, together: int, plan: MemoryPlan | None, refuse: Refuse) -> _Result:
        """Train, choose, export."""
        execution = {
            "residency": execution_settings(self._compute, plan),
            "limits": pass_settings(self._sweep, self._train, plan),
        }
        driver = self._driver(together, refuse)
        cluster = Cluster(SweepWorker, self._arguments(execution), self._compute, most=cohort_size(self._sweep))
        steps, tokens = driver.predicted()
        diaries = StepTail(self._work.trials_dir)
        view = SweepView(trial_count(self._sweep), tokens, self._compute.price_per_gpu_hour, diaries)
        with ray_connection(self._compute.ray_address, self._compute.workers), cluster, live_table(view) as show:
            self._show = show
            records = driver.run(cluster)
            candidates, finals = self._choose(driver, cluster, records)
            candidates = self._export(cluster, candidates)
            held = cluster.worker_seconds
        self._note_speed(records)
        price = self._compute.price_per_gpu_hour
        predicted = predicted_cost(steps, tokens, self._rate, price)
        actual = actual_cost([*records, *self._study.extras()], price, worker_seconds=held)
        _LOGGER.info("sweep: %s", cost_line(predicted, actual))
        cost = {"predicted": predicted, "actual": actual}
        return _Result(records, candidates, finals, cost, plan_record(plan))

    def _note_speed(self, records: Sequence[TrialRecord]) -> None:
        """Keep how fast this base trains here, for the next plan."""
        parameters = read_shapes(self._work.quantized_folder).parameters
        key = speed_key(parameters, self._compute.ray_address or local_device()[0])
        seconds, tokens = (sum(getattr(record, name) for record in records) for name in ("seconds", "tokens"))
        note_speed(self._work.work_dir.parent, key, seconds, int(tokens))

    def _choose(
        self, driver: SweepDriver, cluster: Cluster, records: list[TrialRecord]
    ) -> tuple[list[TrialRecord], dict[str, Any] | None]:
        """The candidates, the winner first; none where no trial is complete."""
        if self._sweep.finalists is None:
            best, finals = best_trial(records, self._sweep), None
        else:
            best, finals = Finals(driver, self._sweep, self._sweep.finalists).run(cluster, records)
        if best is None:
            return [], None
        wanted = self._sweep.candidates
        candidates = ranked_trials(records, self._sweep, finals, best, wanted)
        if len(candidates) < wanted:
            _LOGGER.warning("%d of %d candidates: no more trials are complete", len(candidates), wanted)
        return candidates, finals

    def _export(self, cluster: Cluster, candidates: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Those whose adapters are in the work folder now. Without the best's there is no result; another is told."""
        exported = []
        for place, record in enumerate(candidates):
            try:
                _export(cluster, record, self._work, self._sweep.max_attempts)
            except SweepError as error:
                if place == 0:
                    raise
                _LOGGER.warning("trial %s is no candidate: %s", record.id, error)
                record.error = f"no candidate: {error}"
                continue
            exported.append(record)
        return exported

    def _driver(self, together: int, refuse: Refuse) -> SweepDriver:
        rows = trained_rows(self._work.curated_folder, self._train.objective)
        shapes = read_shapes(self._work.quantized_folder)

        def length_of(params: TrainConfig) -> TrialLength:
            if (reason := refuse(params)) is not None:
                raise SweepError(f"refused by the memory plan: {reason}")
            return rows.length_of(params)

        return SweepDriver(
            self._study,
            self._sweep,
            self._train,
            length_of,
            self._take,
            pack_size=together,
            size_of=lambda params: sum(adapter_sizes(shapes, lora_shape(params)).values()),
        )

    def _take(self, record: TrialRecord) -> None:
        self._show(record)
        if self._rate is None and record.role == "trial":
            # The first that is known: what comes after is what the prediction is compared with.
            self._rate = seconds_per_token([record])
        if self._on_trial is not None and record.role == "trial":
            self._on_trial(record.row())

    def _arguments(self, execution: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "quantized_folder": str(self._work.quantized_folder.resolve()),
            "curated_folder": str(self._work.curated_folder.resolve()),
            "trials_dir": str(self._work.trials_dir.resolve()),
            "original_folder": str(original.resolve()) if (original := self._work.original_folder) else None,
            "start_folder": str(start.resolve()) if (start := self._work.start_folder) else None,
            "parent_folder": str(parent.resolve()) if (parent := self._work.parent_folder) else None,
            "precision": self._train.precision,
            "kept": self._work.kept,
            **execution,
            "memory_sharers": min(cohort_size(self._sweep), self._compute.workers or MOST_CPU_WORKERS),
        }


def _plan(
    sweep: SweepConfig, train: TrainConfig, compute: ComputeConfig, work: SweepWork
) -> tuple[int, MemoryPlan | None, Refuse]:
    """How many trials go together, the memory plan, and what it refuses of single trials."""
    together = _pack_size(train, compute, work)
    inputs = (work.quantized_folder, work.curated_folder)
    plan, refuse = plan_space(sweep, train, compute, *inputs, most_workers=MOST_CPU_WORKERS, pack_size=together)
    return (together if plan is None else plan.pack_size), plan, refuse


def _export(cluster: Cluster, best: TrialRecord, work: SweepWork, attempts: int) -> None:
    folder = _export_folder(work, best)
    deaths = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        outcome = _call(cluster, "export", {"id": best.id, "params": best.params}, str(folder.resolve()))
        if outcome.result is not None:
            break
        deaths += outcome.died and not outcome.preempted
        if not outcome.died or deaths > attempts:
            raise SweepError(
                f"the adapter of trial {best.id} could not be exported: {outcome.error}; its checkpoint is kept"
            )
    tokenizer = work.curated_folder / "tokenizer"
    write_adapter_card(folder, work.lineage, best.params, outcome.result["precision"], tokenizer)


def _call(cluster: Cluster, method: str, *arguments: Any) -> Outcome:
    """One call on whichever worker is free first."""
    while not (idle := cluster.idle()):
        cluster.wait(1.0)
    cluster.submit(idle[0], method, method, *arguments)
    while True:
        for outcome in cluster.wait(1.0):
            if outcome.task == method:
                return outcome


def _copy_adapters(work: SweepWork, candidates: Sequence[TrialRecord], out: Path) -> None:
    shutil.copytree(_export_folder(work, candidates[0]), out / "adapter", dirs_exist_ok=True)
    if len(candidates) > 1:
        for record in candidates:
            shutil.copytree(_export_folder(work, record), out / "adapters" / record.id, dirs_exist_ok=True)


def _export_folder(work: SweepWork, record: TrialRecord) -> Path:
    # In the work folder, which workers on other machines see too; `out` may be local to the driver.
    return work.work_dir / "export" / record.id


def _pack_size(train: TrainConfig, compute: ComputeConfig, work: SweepWork) -> int:
    device = "cpu" if compute.ray_address is None and local_device()[0] == "cpu" else "cuda"
    answers = 2 if train.objective == "dpo" else 1
    return pack_size(compute.pack_size, train, answers * mean_tokens(work.curated_folder), device)


def _identity(sweep: SweepConfig, train: TrainConfig, lineage: Mapping[str, str]) -> dict[str, Any]:
    """All that the sweep's result depends on. How often to try again and how often to checkpoint are no part of it."""
    return {
        "sweep": sweep.model_dump(mode="json", exclude=set(WITHOUT_EFFECT)),
        "train": train.model_dump(mode="json", exclude={"checkpoint_every_steps"}),
        "data": lineage.get("data_digest"),
        "quantized base": lineage.get("quantized_base_digest"),
    }
