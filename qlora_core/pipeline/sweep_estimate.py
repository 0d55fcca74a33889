"""What a sweep will take before it runs: trials, steps, tokens, worker-seconds and price. Builds nothing, no torch."""

from typing import Any

from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.sweep.cluster import MOST_CPU_WORKERS
from qlora_core.sweep.cost import predicted_cost
from qlora_core.sweep.prediction import predicted_work
from qlora_core.sweep.ray_connection import local_cores
from qlora_core.sweep.space import cohort_size, trial_count
from qlora_core.sweep.speed import estimated_speed, known_speed, speed_key
from qlora_core.sweep.trial_length import trained_rows
from qlora_core.training.memory.machine import local_device, local_gpu_count
from qlora_core.training.memory.shapes import read_shapes


def estimate_sweep(pipeline: Pipeline) -> dict[str, Any]:
    """`trials`, `steps`, `tokens`, `seconds_per_token`, `worker_seconds`, `cost`, `workers`, `basis` and `note`.

    `steps` to `cost` are None where the data has yet to be curated or the base to be made, as `note` then says; `cost`
    also without `compute.price_per_gpu_hour`. `basis` says where the speed is from: an earlier sweep of this base here,
    else arithmetic. `worker_seconds` are of all workers together; `workers` is how many a run here would start,
    None on a cluster, whose nodes come and go.
    """
    config = pipeline.job.config
    empty = dict.fromkeys(("steps", "tokens", "seconds_per_token", "worker_seconds", "cost", "workers", "basis"))
    found: dict[str, Any] = {"trials": trial_count(config.sweep), **empty, "note": None}
    planned = {stage.name: stage for stage in pipeline.plan()}
    missing = [name for name in ("base", "curate") if name in planned and not planned[name].cached]
    if missing:
        return found | {"note": "known once the data is curated and the base is there: run `qlora curate` first"}
    length = trained_rows(pipeline.run("curate").artifact.path, config.train.objective).length_of(config.train)
    steps, tokens = predicted_work(config.sweep, length)
    speed, basis = _speed(pipeline)
    cost = predicted_cost(steps, tokens, speed, config.compute.price_per_gpu_hour)
    return found | cost | {"seconds_per_token": speed, "workers": started_workers(pipeline), "basis": basis}


def _speed(pipeline: Pipeline) -> tuple[float | None, str]:
    external, config = pipeline.job.external_base, pipeline.job.config
    folder = pipeline.run("base").artifact.path if external is None else external.folder
    parameters, (device, _) = read_shapes(folder).parameters, local_device()
    where = config.compute.ray_address or device
    known = known_speed(config.work_dir / "sweeps", speed_key(parameters, where))
    if known is not None:
        return known, "measured by the last sweep of this base here"
    if config.compute.ray_address is not None:
        return None, "not known on this cluster until a sweep of this base has ended there"
    return estimated_speed(parameters, device)


def started_workers(pipeline: Pipeline) -> int | None:
    """How many workers a run would start on this machine; None on a cluster that decides."""
    compute = pipeline.job.config.compute
    most = cohort_size(pipeline.job.config.sweep)
    if compute.workers is not None:
        return min(most, compute.workers)
    if compute.ray_address is not None:
        return None
    gpus = 0 if compute.gpus == "none" else local_gpu_count()
    return min(most, gpus or min(local_cores(), MOST_CPU_WORKERS))


def sweep_lines(estimate: dict[str, Any]) -> list[str]:
    """The estimate in words, a line or two."""
    if estimate["note"] is not None:
        return [f"sweep: {estimate['trials']} trials; steps, tokens and time are {estimate['note']}"]
    line = f"sweep: {estimate['trials']} trials, {estimate['steps']:,} steps, {estimate['tokens']:,} trained tokens"
    if estimate["worker_seconds"] is None:
        return [line, f"  time {estimate['basis']}"]
    line += f", {estimate['worker_seconds']:,.0f} worker-seconds"
    if estimate["workers"]:
        line += f" on up to {estimate['workers']} workers"
    if estimate["cost"] is not None:
        line += f", cost {estimate['cost']:.2f}"
    return [line, f"  speed {estimate['basis']}"]
