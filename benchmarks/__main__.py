"""Runs every benchmark, or those named, and writes their figures and the machine's to benchmarks/results/."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import (
    adapter_merge,
    adapter_serving,
    curate_incremental,
    curate_scale,
    gate_simulation,
    gpu,
    memory_plan,
    multi_adapter,
    near_duplicates,
    packed_training,
    quantize_kernels,
    quantize_stream,
    ratings,
    ratings_judge,
    ratings_schedule,
    residency,
    store_transfer,
    sweep_makespan,
    sweep_overhead,
    sweep_simulation,
    tag_cache,
    warm_start,
)

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ("torch", "transformers", "bitsandbytes", "boto3", "moto", "rensa", "datasketch", "numba", "polars")
    return {"cpu": model, "cores": os.cpu_count(), "packages": {name: version(name) for name in packages}}


ALL = (
    warm_start,
    store_transfer,
    near_duplicates,
    packed_training,
    tag_cache,
    curate_incremental,
    curate_scale,
    memory_plan,
    multi_adapter,
    quantize_stream,
    residency,
    quantize_kernels,
    ratings,
    ratings_judge,
    ratings_schedule,
    adapter_merge,
    adapter_serving,
    sweep_makespan,
    sweep_overhead,
    sweep_simulation,
    gate_simulation,
)
ON_REQUEST = (gpu,)
"""Run only when named: they need what not every machine has."""


def main() -> None:
    """Run those that are named on the command line, or all; one JSON file each."""
    RESULTS.mkdir(exist_ok=True)
    known = {module.__name__.rpartition(".")[2]: module for module in (*ALL, *ON_REQUEST)}
    wanted = sys.argv[1:] or [name for name, module in known.items() if module in ALL]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    for name in wanted:
        figures = {"machine": machine(), **known[name].measure()}
        (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        sys.stdout.write(f"{name}: {json.dumps(figures, indent=1)}\n")


if __name__ == "__main__":
    main()
