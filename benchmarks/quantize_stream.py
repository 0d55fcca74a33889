"""Quantizing a checkpoint of billions of parameters by streaming: memory and time, beside transformers' own way.

The checkpoint is made on the spot: Llama-shaped, random bfloat16, in several shards. Each way runs in a fresh process
with one thread, and its peak memory is counted over what the process held when its imports were done. The peer is
`from_pretrained` with a BitsAndBytesConfig, and `save_pretrained`. Compiled kernels are taken from an earlier run.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import TWO_BILLION, LlamaShape, write_checkpoint

_IMPORTS = """
import json, resource, sys, time
from pathlib import Path

def held_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def measured(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    held, wall, cpu = held_bytes(), time.perf_counter(), time.process_time()
    work()
    figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({**figures, "import_bytes": held, "peak_growth_bytes": int(peak.split()[1]) * 1024 - held}))
"""
_OURS = f"""{_IMPORTS}
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.quantization.quantize import quantize_checkpoint
measured(lambda: quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), QuantizeConfig()))
"""
_PEER = f"""{_IMPORTS}
import torch, bitsandbytes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
def work():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=settings, device_map={{"": "cpu"}})
    model.save_pretrained(sys.argv[2])
measured(work)
"""


def measure(shape: LlamaShape = TWO_BILLION) -> dict[str, Any]:
    """Parameters, bytes, and for both ways seconds and memory; MB of the source a second; the ratio of CPU seconds.

    Takes some minutes, and disk for the checkpoint and two 4-bit forms of it.
    """
    with tempfile.TemporaryDirectory(prefix="quantize-stream-") as name:
        folder = Path(name)
        parameters = write_checkpoint(folder / "base", shape)
        ours = _run(_OURS, folder / "base", folder / "ours")
        report = json.loads((folder / "ours" / "quantization.json").read_text())
        peer = _run(_PEER, folder / "base", folder / "peer")
    names = ("source_bytes", "written_bytes", "shards", "bits_per_parameter", "relative_l2")
    ours["source_mb_per_s"] = report["source_bytes"] / 1e6 / ours["wall_s"]
    ours["source_mb_per_cpu_s"] = report["source_bytes"] / 1e6 / ours["cpu_s"]
    return {
        "layers": shape.layers,
        "parameters": parameters,
        **{name: report[name] for name in names},
        "ours": ours,
        "transformers_and_bitsandbytes": peer,
        "peer_over_ours_cpu": peer["cpu_s"] / ours["cpu_s"],
    }


def _run(program: str, source: Path, out: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(source), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
