"""The device that a worker on this machine will train on, and its free memory, found without importing torch."""

import os
import shutil
import subprocess

from qlora_core.available_memory import available_memory_bytes

_ANSWER_S = 20.0


def local_device() -> tuple[str, int | None]:
    """`("cuda", free bytes)` of the GPU with the least free memory, else `("cpu", available bytes)`.

    GPUs are those that NVIDIA's own tool lists and CUDA_VISIBLE_DEVICES does not hide. Bytes are None where the system
    does not say.
    """
    gpus = _free_gpu_bytes()
    if gpus:
        return "cuda", min(gpus)
    return "cpu", available_memory_bytes("cpu")


def local_gpu_count() -> int:
    """How many GPUs `local_device` would choose from."""
    return len(_free_gpu_bytes())


def _free_gpu_bytes() -> list[int]:
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or visible in ("", "-1"):
        return []
    command = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if visible is not None:
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in done.stdout.splitlines() if line.strip().isdigit()]
