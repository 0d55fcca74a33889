"""What a job will need before it runs: its trials, its memory as planned for this machine, the judge. No torch here."""

import itertools
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.evaluation.judge.client import resolve_kind
from qlora_core.evaluation.judge.endpoint import planned_cost_usd
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.sweep.cluster import MOST_CPU_WORKERS
from qlora_core.sweep.memory_check import largest_trial
from qlora_core.sweep.space import cohort_size, trial_count
from qlora_core.training.memory.machine import local_device
from qlora_core.training.memory.parts import Workload
from qlora_core.training.memory.plan import MemoryPlan, find_remedy, plan_memory
from qlora_core.training.memory.shapes import read_shapes

_SECOND_LEVEL_BLOCKSIZE = 256


def planned_trials(config: PipelineConfig) -> list[dict[str, Any]]:
    """The trials' settings where they are known before the run (a grid), else one `{"draw": n}` for each draw."""
    sweep = config.sweep
    if sweep.method == "grid":
        lists = {name: values for name, values in sweep.space.items() if isinstance(values, list)}
        points = itertools.product(*lists.values())
        return [dict(zip(lists, point, strict=True)) for point in points][: trial_count(sweep)]
    return [{"draw": number} for number in range(trial_count(sweep))]


def estimate_judge(config: PipelineConfig, *, evaluated: bool = False) -> dict[str, Any]:
    """The judge to be asked: `kind`, `calls` at most (two orders a prompt), `cost_usd`, and the `budget_usd` cap.

    Where the evaluation is stored already (`evaluated`), nobody is asked any more.
    Raises ConfigError where an endpoint's price is not known.
    """
    kind = resolve_kind(config.evaluate.judge, os.environ)
    return {
        "kind": kind,
        "calls": 0 if kind == "none" or evaluated else 2 * config.evaluate.max_prompts,
        "cost_usd": 0.0 if evaluated else planned_cost_usd(config.evaluate, os.environ),
        "budget_usd": config.evaluate.judge.budget_usd,
    }


def estimate_memory(pipeline: Pipeline) -> dict[str, Any]:
    """What one worker needs for its largest trial, as JSON data; a note instead where the base has yet to be made.

    Keys: `quantized_base_bytes`, `adapter_bytes` (float32 weights and gradients), `optimizer_bytes`, `logits_bytes`,
    `floor_bytes`, their sum; `training` and `validation`, all parts at the worst moment of each; `peak_bytes`, the
    larger sum, and beside it `import_floor_bytes`; `available_bytes` for each worker (None: not known); `fits`,
    whether the sweep can run as it is configured; `remedy`, the first single setting with which it could where it
    cannot (None: there is none); `device`, `residency`, `gradient_checkpointing`, `micro_batch_size`,
    `gradient_accumulation_steps` and `pack_size` as configured, or as chosen where that does not fit; and `reasons`.
    """
    base = pipeline.job.external_base
    if base is not None:
        return _planned(pipeline.job.config, base.folder)
    planned = next(stage for stage in pipeline.plan() if stage.name == "base")
    if not planned.cached:
        return {"note": "the demo base is made by the first stage; it needs under 100 MB"}
    return _planned(pipeline.job.config, pipeline.run("base").artifact.path)


def _planned(config: PipelineConfig, folder: Path) -> dict[str, Any]:
    shapes = read_shapes(folder)
    device, available = local_device()
    if device == "cpu" and available is not None:
        available //= min(cohort_size(config.sweep), config.compute.workers or MOST_CPU_WORKERS)
    train = largest_trial(config.sweep, config.train)
    pack_size = config.compute.pack_size or 1
    work = Workload(train, config.quantize, _sequence_tokens(config), config.data.max_tokens, pack_size)
    residency = config.compute.residency
    plan = plan_memory(shapes, work, available, device, residency=residency, fixed=True)
    if plan.fits:
        return {**_floor(plan), **_choice(plan), "fits": True, "remedy": None}
    remedy = find_remedy(plan, shapes, work, residency=residency, fixed=True)
    chosen = plan_memory(shapes, work, available, device, residency=residency)
    return {**_floor(chosen), **_choice(chosen), "fits": False, "remedy": remedy}


def _floor(plan: MemoryPlan) -> dict[str, int]:
    parts = plan.training
    floor = {
        "quantized_base_bytes": parts.codes_bytes + parts.kept_weights_bytes,
        "adapter_bytes": parts.adapter_bytes + parts.gradient_bytes,
        "optimizer_bytes": parts.optimizer_bytes,
        "logits_bytes": parts.logits_bytes,
    }
    return {**floor, "floor_bytes": sum(floor.values())}


def _choice(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "training": asdict(plan.training),
        "validation": asdict(plan.validation),
        "peak_bytes": plan.peak_bytes,
        "import_floor_bytes": plan.import_floor_bytes,
        "paged_bytes": plan.paged_bytes,
        "available_bytes": plan.available_bytes,
        "device": plan.device,
        "residency": plan.residency,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "pack_size": plan.pack_size,
        "reasons": list(plan.reasons),
    }


def bits_per_parameter(config: PipelineConfig) -> float:
    """Stored bits of one quantized weight: 4 + 32/B at blocksize B, with double quantization 4 + 8/B + 32/(256 B).

    Dettmers et al. 2023, section 3: 4.5 and 4.127 at blocksize 64.
    """
    blocksize = config.quantize.blocksize
    if not config.quantize.double_quant:
        return 4 + 32 / blocksize
    return 4 + 8 / blocksize + 32 / (_SECOND_LEVEL_BLOCKSIZE * blocksize)


def _sequence_tokens(config: PipelineConfig) -> int:
    packing = config.data.packing
    return packing.tokens or config.data.max_tokens if packing.enabled else config.data.max_tokens
