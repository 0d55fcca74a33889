"""A sweep from its config to its result: the best trial's adapter, and a row for every trial.

May be interrupted at any point, by Ctrl-C or by killing any of its processes: the same call with the same `work_dir`
goes on where it was. With a store it goes on with an empty `work_dir` too, on any machine: the study, which is kept
nowhere else, is drawn again, since every draw follows from the sweep's seed and earlier results, and each trial goes on
from its checkpoint in the store. Knows where things are kept; the driver knows the loop, the cluster the workers.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import DataError, SweepError
from qlora_core.sweep.adapter_card import write_adapter_card
from qlora_core.sweep.cluster import MOST_CPU_WORKERS, Cluster, Outcome, ray_connection
from qlora_core.sweep.driver import OnTrial, SweepDriver
from qlora_core.sweep.keeper import work_name
from qlora_core.sweep.lock import DRIVER_LOCK, OTHER_DRIVER_S, exclusive_lock
from qlora_core.sweep.memory_check import check_memory, execution_settings, mean_tokens, pass_settings, plan_record
from qlora_core.sweep.pack_size import pack_size
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.rungs import TrialLength
from qlora_core.sweep.space import cohort_size
from qlora_core.sweep.study import best_record, open_study, set_aside
from qlora_core.sweep.worker import SweepWorker
from qlora_core.training.memory.machine import local_device
from qlora_core.training.schedule import total_steps, warmup_steps

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepWork:
    """Where a sweep finds its inputs and keeps its state.

    `work_dir` is durable, and every worker sees it: `study.db`, checkpoints in `trials/<id>/`. `lineage` names what the
    adapter is bound to (see `adapter_card.LINEAGE`); the digests in it tell this sweep from others.

    `store` are the arguments of `open_store`, as JSON data: there each trial's newest checkpoint is kept too, under the
    name of `work_dir`, which must be the sweep's own. None keeps them in `work_dir` alone. `lease` is the name of the
    lease under which the sweep runs, `inputs` the digests of the artifacts it is made from.
    """

    quantized_folder: Path
    curated_folder: Path
    work_dir: Path
    lineage: Mapping[str, str]
    store: Mapping[str, Any] | None = None
    lease: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)

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
    on_trial: OnTrial | None = None,
) -> dict[str, Any]:
    """Train the sweep's trials and write `sweep.json` and `adapter/` (the best trial's PEFT folder) into `out`.

    `on_trial` is called in this process with a trial's row as in `sweep.json` whenever the trial changed, and once
    for each trial when it is taken up again after an interruption (`state` is "waiting" until it is finished).

    Returns what `sweep.json` holds: `method`, `varied` (names in the search space), `trials`, `best` (a trial's id),
    `memory` (how the largest trial was planned to run and why; None where the workers are elsewhere).
    Raises SweepError when no trial finished, listing every trial's error; the next call then tries all of them again.
    Raises TrainingError, before anything is loaded, when the largest trial does not fit this machine's memory, and
    LeaseLostError when another machine has taken the sweep over.
    """
    with exclusive_lock(work.work_dir / DRIVER_LOCK, purpose="this sweep runs already", wait_s=OTHER_DRIVER_S):
        inputs = (work.quantized_folder, work.curated_folder)
        together = _pack_size(train, compute, work)
        plan = check_memory(sweep, train, compute, *inputs, most_workers=MOST_CPU_WORKERS, pack_size=together)
        execution = {
            "residency": execution_settings(compute, plan),
            "limits": pass_settings(sweep, train, plan),
        }
        together = together if plan is None else plan.pack_size
        records, best = _train_and_export(sweep, train, compute, work, execution, together, on_trial)
        if best is None:
            kept = set_aside(work.study_file)
            errors = "; ".join(f"{record.id}: {record.error}" for record in records)
            raise SweepError(f"none of {len(records)} trials finished: {errors} (the study is kept as {kept})")
        summary = {
            "method": sweep.method,
            "varied": sorted(sweep.space),
            "trials": [record.row() for record in records],
            "best": best.id,
            "memory": plan_record(plan),
        }
        shutil.copytree(_export_folder(work, best), out / "adapter", dirs_exist_ok=True)
        (out / "sweep.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        return summary


def _train_and_export(
    sweep: SweepConfig,
    train: TrainConfig,
    compute: ComputeConfig,
    work: SweepWork,
    execution: Mapping[str, Any],
    together: int,
    on_trial: OnTrial | None,
) -> tuple[list[TrialRecord], TrialRecord | None]:
    rows = _trained_rows(work.curated_folder)
    with open_study(work.study_file, sweep, train, _identity(sweep, train, work.lineage)) as study:
        driver = SweepDriver(study, sweep, train, lambda params: _length(params, rows), on_trial, pack_size=together)
        arguments = {
            "quantized_folder": str(work.quantized_folder.resolve()),
            "curated_folder": str(work.curated_folder.resolve()),
            "trials_dir": str(work.trials_dir.resolve()),
            "precision": train.precision,
            "kept": work.kept,
            **execution,
            "memory_sharers": min(cohort_size(sweep), compute.workers or MOST_CPU_WORKERS),
        }
        with (
            ray_connection(compute.ray_address, compute.workers),
            Cluster(SweepWorker, arguments, compute, most=cohort_size(sweep)) as cluster,
        ):
            records = driver.run(cluster)
            best = best_record(records)
            if best is not None:
                _export(cluster, best, work, sweep.max_attempts)
    return records, best


def _export(cluster: Cluster, best: TrialRecord, work: SweepWork, attempts: int) -> None:
    folder = _export_folder(work, best)
    deaths = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        outcome = _call(cluster, "export", {"id": best.id, "params": best.params}, str(folder.resolve()))
        if outcome.result is not None:
            break
        deaths += outcome.died
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


def _export_folder(work: SweepWork, record: TrialRecord) -> Path:
    # In the work folder, which workers on other machines see too; `out` may be local to the driver.
    return work.work_dir / "export" / record.id


def _pack_size(train: TrainConfig, compute: ComputeConfig, work: SweepWork) -> int:
    device = "cpu" if compute.ray_address is None and local_device()[0] == "cpu" else "cuda"
    return pack_size(compute.pack_size, train, mean_tokens(work.curated_folder), device)


def _length(params: TrainConfig, rows: int) -> TrialLength:
    total = total_steps(params, rows)
    return TrialLength(total, warmup_steps(params, total))


def _trained_rows(curated: Path) -> int:
    """What a batch is made of: packed sequences where there are any, else training rows with a trained token.

    The first token of a row is never predicted, and so never trained.
    """
    import polars

    from qlora_core.data.packing import count_packs
    from qlora_core.data.shards import shard_files

    packs = count_packs(curated)
    if packs is not None:
        return packs
    has_trained_token = polars.col("loss_mask").list.slice(1).list.any()
    try:
        rows = polars.scan_parquet(shard_files(curated, "train")).select(has_trained_token.sum())
        return int(rows.collect().item())
    except (OSError, polars.exceptions.PolarsError) as error:
        raise DataError(f"{curated} is no curated set: {error}; curate the data again") from error


def _identity(sweep: SweepConfig, train: TrainConfig, lineage: Mapping[str, str]) -> dict[str, Any]:
    """All that the sweep's result depends on. How often to try again and how often to checkpoint are no part of it."""
    return {
        "sweep": sweep.model_dump(mode="json", exclude={"max_attempts"}),
        "train": train.model_dump(mode="json", exclude={"checkpoint_every_steps"}),
        "data": lineage.get("data_digest"),
        "quantized base": lineage.get("quantized_base_digest"),
    }
