"""How long a trained token takes a worker: as sweeps here have measured it, else as arithmetic estimates it.

Knows sizes and devices; no torch, no configs. What was measured is kept in a JSON file beside the sweeps' folders.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

SPEEDS = "speeds.json"
FLOPS_PER_PARAMETER = 4
"""Of a trained token over a frozen base: 2 forward and 2 for the gradients of activations (Kaplan et al. 2020)."""

PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "4090": 165,
}  # fmt: skip
"""Dense bf16 matrix products by what the GPU's name holds, from the makers' data sheets."""

_GPU_SHARE, _CPU_SHARE = 0.3, 0.25
"""How much of the peak a trial reaches: assumed."""

_ANSWER_S = 20.0


def speed_key(parameters: int, where: str) -> str:
    """What speeds are kept by: the base's size, and `cpu`, `cuda` or a cluster's address."""
    return f"{parameters} parameters on {where}"


def note_speed(folder: Path, key: str, worker_seconds: float, tokens: int) -> None:
    """Keep what a sweep has measured, in place of what an earlier one had; nothing without tokens."""
    if tokens <= 0 or worker_seconds <= 0:
        return
    file = folder / SPEEDS
    known = {**_read(file), key: {"seconds_per_token": worker_seconds / tokens, "tokens": tokens}}
    staged = file.with_name(f".{SPEEDS}.{os.getpid()}")
    staged.write_text(json.dumps(known, indent=1) + "\n")
    staged.replace(file)


def known_speed(folder: Path, key: str) -> float | None:
    """Worker-seconds of a trained token as measured last; None where no sweep of this base ended here yet."""
    entry = _read(folder / SPEEDS).get(key)
    return None if entry is None else float(entry["seconds_per_token"])


def estimated_speed(parameters: int, device: str) -> tuple[float | None, str]:
    """Worker-seconds of a trained token from the device's matrix products, and how that was reckoned.

    None for a GPU whose name is not in `PEAK_TFLOPS`. Bases of less than some 100M parameters take longer: there it is
    not the products that cost.
    """
    if device == "cuda":
        name = _gpu_name()
        peak = next((tflops * 1e12 for held, tflops in PEAK_TFLOPS.items() if held in name), None)
        if peak is None:
            return None, f"not known for a GPU called {name!r}; it is once a sweep has ended here"
        reached, what = _GPU_SHARE * peak, f"{_GPU_SHARE:.0%} of the peak of {name}"
    else:
        reached = _CPU_SHARE * _matmul_flops()
        what = f"{_CPU_SHARE:.0%} of the matrix products a core of this machine does"
    return FLOPS_PER_PARAMETER * parameters / reached, f"estimated at {what}, until a sweep here has measured it"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _gpu_name() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"


def _matmul_flops() -> float:
    """Floating-point operations a second of CPU in float32 products; the best of a few, some 50 ms."""
    import numpy

    size = 384
    left = numpy.ones((size, size), dtype=numpy.float32)
    best = 0.0
    for _ in range(5):
        begun = time.process_time()
        for _ in range(4):
            numpy.matmul(left, left)
        best = max(best, 4 * 2 * size**3 / max(time.process_time() - begun, 1e-6))
    return best
