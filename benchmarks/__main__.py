"""Runs every benchmark, or those named, and writes their figures and the machine's to benchmarks/results/."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import (
    curate_scale,
    memory_plan,
    multi_adapter,
    near_duplicates,
    packed_training,
    quantize_kernels,
    quantize_stream,
    residency,
    store_transfer,
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


def main() -> None:
    """Run those that are named on the command line, or all; one JSON file each."""
    RESULTS.mkdir(exist_ok=True)
    for module in (
        warm_start,
        store_transfer,
        near_duplicates,
        packed_training,
        tag_cache,
        curate_scale,
        memory_plan,
        multi_adapter,
        quantize_stream,
        residency,
        quantize_kernels,
    ):
        name = module.__name__.rpartition(".")[2]
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        figures = {"machine": machine(), **module.measure()}
        (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        sys.stdout.write(f"{name}: {json.dumps(figures, indent=1)}\n")


if __name__ == "__main__":
    main()
