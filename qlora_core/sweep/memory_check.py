"""Whether a sweep's largest trial fits the memory of this machine, asked before a worker starts or a base is loaded.

Knows the sweep's inputs as folders. Says nothing of machines elsewhere: workers of a cluster have memory of their own.
"""

import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.config.sweep import FloatRange, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import DataError, SweepError, TrainingError
from qlora_core.quantization.checkpoint import read_model_config
from qlora_core.sweep.space import cohort_size, trial_params
from qlora_core.training.memory.activations import LoraShape
from qlora_core.training.memory.machine import local_device
from qlora_core.training.memory.parts import Workload
from qlora_core.training.memory.plan import MemoryPlan, plan_memory, refuse_unfit
from qlora_core.training.memory.shapes import read_shapes

_LOGGER = logging.getLogger(__name__)
_SIZE_FIELDS = (
    "lora_rank", "micro_batch_size", "gradient_checkpointing", "use_dora", "optimizer", "lora_init", "target_modules",
)  # fmt: skip
_MOST_POINTS = 256
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
    sharers: int | None = None,
) -> MemoryPlan | None:
    """The plan of packs of the largest trial on this machine's device; None where the workers are elsewhere.

    Its `pack_size` is the largest that fits, `pack_size` at most. Micro-batches and gradient checkpointing are as
    configured where a trial fits with them, alone if need be; else the plan says how it does. Workers on CPUs divide
    what is available, and are `most_workers` at most, or `sharers` where that is given.

    Raises:
        TrainingError: it cannot fit; bytes and the setting that would do are named.
        ModelError, DataError: the base or the curated set cannot be read.
    """
    if compute.ray_address is not None:
        return None
    device, available = local_device()
    workers = sharers or min(cohort_size(sweep), compute.workers or most_workers)
    if device == "cpu" and available is not None:
        available //= workers
    training, validation = longest_rows(curated, pairs=train.objective == "dpo")
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


Refuse = Callable[[TrainConfig], "str | None"]
"""Why a trial of these settings does not fit; None where it does."""


def plan_space(
    sweep: SweepConfig,
    train: TrainConfig,
    compute: ComputeConfig,
    quantized: Path,
    curated: Path,
    *,
    most_workers: int,
    pack_size: int = 1,
) -> tuple[MemoryPlan | None, Refuse]:
    """The plan as `check_memory` makes it; where the largest trial does not fit, that of the largest point that does.

    The second result then says of a trial why it does not: it fails alone.

    Raises:
        TrainingError: no point fits; the smallest one's bytes, and the setting that would do, are named.
        ModelError, DataError: as `check_memory`.
    """
    workers = min(cohort_size(sweep), compute.workers or most_workers)

    def plan_of(params: TrainConfig) -> MemoryPlan | None:
        alone = SweepConfig()
        return check_memory(alone, params, compute, quantized, curated, most_workers=workers, sharers=workers)

    def refuse(params: TrainConfig) -> str | None:
        try:
            plan_of(params)
        except TrainingError as error:
            return str(error)
        return None

    try:
        whole = check_memory(sweep, train, compute, quantized, curated, most_workers=most_workers, pack_size=pack_size)
    except TrainingError as error:
        plans = [plan for params in _points(sweep, train) if (plan := _or_none(plan_of, params)) is not None]
        if not plans:
            smallest = _points(sweep, train)[0]
            drawn = {name: getattr(smallest, name) for name in sweep.space}
            reason = refuse(smallest) or str(error)
            if not drawn:
                raise
            raise TrainingError(f"every point of sweep.space is refused; the smallest, {drawn}: {reason}") from error
        _LOGGER.warning("some points of sweep.space do not fit and will fail: %s", error)
        return max(plans, key=lambda plan: plan.needed_bytes), refuse
    return whole, lambda params: None


def _or_none(plan_of: Callable[[TrainConfig], "MemoryPlan | None"], params: TrainConfig) -> MemoryPlan | None:
    try:
        return plan_of(params)
    except TrainingError:
        return None


def _points(sweep: SweepConfig, train: TrainConfig) -> list[TrainConfig]:
    """Points of a space, the smallest first: every one of a short grid, else those at the low and high ends."""
    ends = {
        name: [values.low, values.high] if isinstance(values, FloatRange) else values
        for name, values in sweep.space.items()
        if name in _SIZE_FIELDS
    }
    found: list[TrainConfig] = []
    for point in itertools.islice(itertools.product(*ends.values()), _MOST_POINTS):
        drawn = {
            name: int(value) if isinstance(value, float) else value for name, value in zip(ends, point, strict=True)
        }
        try:
            found.append(trial_params(train, drawn))
        except SweepError:
            continue
    return sorted(found or [train], key=lambda params: (params.micro_batch_size, params.lora_rank))


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


def lora_shape(params: TrainConfig) -> LoraShape:
    """What of a trial's settings decides how many numbers it trains."""
    return Workload(params, QuantizeConfig(), 1, 1).lora


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


def longest_rows(curated: Path, *, pairs: bool = False) -> tuple[int, int]:
    """Tokens of the longest training row (packed sequence, where there are any) and of the longest validation row.

    With `pairs`, of the longest preference pair, both answers together, and of the longest answer in validation.

    Raises:
        DataError: the folder is no curated set.
    """
    import polars

    from qlora_core.data.packing import read_packs
    from qlora_core.data.shards import shard_files

    lengths = polars.col("input_ids").list.len()
    try:
        if pairs:
            return _longest_pairs(curated)
        training = polars.scan_parquet(shard_files(curated, "train")).select("id", length=lengths).collect()
        validation = polars.scan_parquet(shard_files(curated, "validation")).select(lengths.max()).collect().item()
    except (OSError, polars.exceptions.PolarsError) as error:
        raise DataError(f"{curated} is no curated set: {error}; curate the data again") from error
    length_of: dict[str, int] = dict(training.iter_rows())
    packs = read_packs(curated)
    if packs is None:
        return max(length_of.values(), default=0), int(validation or 0)
    return max((sum(length_of.get(row, 0) for row in ids) for ids in packs), default=0), int(validation or 0)


def _longest_pairs(curated: Path) -> tuple[int, int]:
    import polars

    from qlora_core.data.shards import shard_files

    better, worse = (polars.col(name).list.len().fill_null(0) for name in ("input_ids", "rejected_ids"))
    both = polars.scan_parquet(shard_files(curated, "train")).select((better + worse).max())
    longer = polars.scan_parquet(shard_files(curated, "validation")).select(polars.max_horizontal(better, worse).max())
    return int(both.collect().item() or 0), int(longer.collect().item() or 0)


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
