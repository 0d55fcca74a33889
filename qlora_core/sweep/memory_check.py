"""Whether a sweep's largest trial fits the memory of this machine, asked before a worker starts or a base is loaded.

Knows the sweep's inputs as folders. Says nothing of machines elsewhere: workers of a cluster have memory of their own.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.config.sweep import FloatRange, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import DataError
from qlora_core.quantization.checkpoint import read_model_config
from qlora_core.sweep.space import cohort_size
from qlora_core.training.memory.machine import local_device
from qlora_core.training.memory.parts import Workload
from qlora_core.training.memory.plan import MemoryPlan, plan_memory, refuse_unfit
from qlora_core.training.memory.shapes import read_shapes

_LOGGER = logging.getLogger(__name__)
_STATE_SIZES = ("sgd", "paged_adamw_8bit", "lion", "adamw", "paged_adamw_32bit")  # from small to large


def check_memory(
    sweep: SweepConfig,
    train: TrainConfig,
    compute: ComputeConfig,
    quantized: Path,
    curated: Path,
    *,
    most_workers: int,
    pack_size: int = 1,
) -> MemoryPlan | None:
    """The plan of packs of the largest trial on this machine's device; None where the workers are elsewhere.

    Its `pack_size` is the largest that fits, `pack_size` at most. Micro-batches and gradient checkpointing are as
    configured where a trial fits with them, alone if need be; else the plan says how it does. Workers on CPUs divide
    what is available, and are `most_workers` at most.

    Raises:
        TrainingError: it cannot fit; bytes and the setting that would do are named.
        ModelError, DataError: the base or the curated set cannot be read.
    """
    if compute.ray_address is not None:
        return None
    device, available = local_device()
    workers = min(cohort_size(sweep), compute.workers or most_workers)
    if device == "cpu" and available is not None:
        available //= workers
    training, validation = longest_rows(curated)
    work = Workload(largest_trial(sweep, train), stored_format(quantized), training, validation)
    shapes = read_shapes(quantized)
    tries = [(size, True) for size in range(max(1, pack_size), 0, -1)]
    plans = (
        plan_memory(shapes, replace(work, pack_size=size), available, device, residency=compute.residency, fixed=fixed)
        for size, fixed in [*tries, (1, False)]
    )
    plan = plan_memory(shapes, work, available, device, residency=compute.residency)
    plan = next((way for way in plans if way.fits), plan)
    refuse_unfit(plan, shapes, work, residency=compute.residency)
    _LOGGER.info(
        "memory: packs of %d of the largest trial need %.2f GiB of %s, %s layers. %s",
        plan.pack_size,
        plan.needed_bytes / 2**30,
        "an unknown amount" if available is None else f"{available / 2**30:.2f} GiB on the {device}",
        plan.residency,
        " ".join(plan.reasons),
    )
    return plan


def execution_settings(compute: ComputeConfig, plan: MemoryPlan | None) -> dict[str, Any]:
    """How the workers' layers execute: as configured, and where that is left open, in the scratch if the plan needs it.

    A plan that has room for dense layers leaves it open, for workers know better what is free when they load.
    """
    settings = compute.residency_settings
    if plan is not None and plan.residency == "scratch" and compute.residency == "auto":
        settings["residency"] = "scratch"
    return settings


def pass_settings(sweep: SweepConfig, train: TrainConfig, plan: MemoryPlan | None) -> dict[str, Any]:
    """How the plan has trials computed, as arguments of `PassLimits`; empty where it leaves all as configured."""
    configured = largest_trial(sweep, train)
    settings: dict[str, Any] = {}
    if plan is not None and plan.gradient_checkpointing and not configured.gradient_checkpointing:
        settings["recompute"] = True
    if plan is not None and plan.micro_batch_size < configured.micro_batch_size:
        settings["most_rows"] = plan.micro_batch_size
    return settings


def plan_record(plan: MemoryPlan | None) -> dict[str, Any] | None:
    """What was chosen and why, as JSON data for the sweep's record; None where nothing was planned."""
    if plan is None:
        return None
    names = (
        "device",
        "residency",
        "gradient_checkpointing",
        "micro_batch_size",
        "pack_size",
        "peak_bytes",
        "needed_bytes",
        "available_bytes",
    )
    return {**{name: getattr(plan, name) for name in names}, "reasons": list(plan.reasons)}


def largest_trial(sweep: SweepConfig, train: TrainConfig) -> TrainConfig:
    """A trial that takes at least as much memory as any of the sweep: the worst value of every setting that counts."""
    settings: dict[str, Any] = {name: max(_values(sweep, train, name)) for name in ("lora_rank", "micro_batch_size")}
    settings["gradient_checkpointing"] = all(_values(sweep, train, "gradient_checkpointing"))
    settings["use_dora"] = any(_values(sweep, train, "use_dora"))
    settings["optimizer"] = max(_values(sweep, train, "optimizer"), key=_STATE_SIZES.index)
    settings["lora_init"] = next(
        (start for start in _values(sweep, train, "lora_init") if start in ("pissa", "olora")), train.lora_init
    )
    targets = _values(sweep, train, "target_modules")
    settings["target_modules"] = "all-linear" if "all-linear" in targets else max(targets, key=len)
    return train.model_copy(update=settings)


def _values(sweep: SweepConfig, train: TrainConfig, name: str) -> list[Any]:
    found = sweep.space.get(name)
    if isinstance(found, FloatRange):
        return [int(found.high)]
    return [getattr(train, name)] if found is None else found


def longest_rows(curated: Path) -> tuple[int, int]:
    """Tokens of the longest training row (packed sequence, where there are any) and of the longest validation row.

    Raises:
        DataError: the folder is no curated set.
    """
    import polars

    from qlora_core.data.packing import read_packs
    from qlora_core.data.shards import shard_files

    lengths = polars.col("input_ids").list.len()
    try:
        training = polars.scan_parquet(shard_files(curated, "train")).select("id", length=lengths).collect()
        validation = polars.scan_parquet(shard_files(curated, "validation")).select(lengths.max()).collect().item()
    except (OSError, polars.exceptions.PolarsError) as error:
        raise DataError(f"{curated} is no curated set: {error}; curate the data again") from error
    length_of: dict[str, int] = dict(training.iter_rows())
    packs = read_packs(curated)
    if packs is None:
        return max(length_of.values(), default=0), int(validation or 0)
    return max((sum(length_of.get(row, 0) for row in ids) for ids in packs), default=0), int(validation or 0)


def mean_tokens(curated: Path) -> float:
    """Mean tokens of what a batch is made of: packed sequences where there are any, else training rows.

    Raises:
        DataError: the folder is no curated set.
    """
    import polars

    from qlora_core.data.packing import count_packs
    from qlora_core.data.shards import shard_files

    try:
        lengths = polars.scan_parquet(shard_files(curated, "train")).select(polars.col("input_ids").list.len())
        rows, tokens = lengths.select(polars.len(), polars.col("input_ids").sum().alias("tokens")).collect().row(0)
    except (OSError, polars.exceptions.PolarsError) as error:
        raise DataError(f"{curated} is no curated set: {error}; curate the data again") from error
    packs = count_packs(curated)
    return tokens / max(1, rows if packs is None else packs)


def stored_format(quantized: Path) -> QuantizeConfig:
    """How a quantized folder is stored, from its config and its report; blocksize 64 where there is no report."""
    settings = read_model_config(quantized).get("quantization_config", {})
    report = quantized / "quantization.json"
    blocksize = json.loads(report.read_text(encoding="utf-8"))["blocksize"] if report.is_file() else 64
    return QuantizeConfig(
        blocksize=blocksize,
        double_quant=bool(settings.get("bnb_4bit_use_double_quant", True)),
        skip_modules=list(settings.get("llm_int8_skip_modules") or ["lm_head"]),
    )
