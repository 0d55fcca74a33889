"""What merging keeps of an adapter (`adapter_stories`), and the memory and time of writing a larger random shape.

Does a merge stream, or hold the model? Writing alone, in a process each: the certificate loads the 4-bit base and the
candidate besides, as serving them does. Memory is what the process took beyond its imports; the model is as large in
float32 as `float32_bytes` says.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.adapter_stories import measure_stories
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.demo.tokenizer import train_tokenizer
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint

LAYERS = 8
TARGETS = ("16bit", "nf4")
_CHILD = """
import sys, json, time, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
from qlora_core.adapters.adapter_folder import open_adapter
from qlora_core.adapters.dense_checkpoint import closest_dtype, write_dense
from qlora_core.adapters.merge_source import DequantizedSource, open_merge_base
from qlora_core.quantization.quantize import quantize_checkpoint
base, adapter, out, target = Path(sys.argv[1]), open_adapter(Path(sys.argv[2])), Path(sys.argv[3]), sys.argv[4]
# not ru_maxrss: a child starts with its parent's
lines = lambda: Path("/proc/self/status").read_text().splitlines()
peak = lambda: next(int(line.split()[1]) * 1024 for line in lines() if line.startswith("VmHWM"))
before, started = peak(), time.monotonic()
with tempfile.TemporaryDirectory() as side:
    source = DequantizedSource(base, Path(side), {"base": "benchmark"})
    merge_base = open_merge_base(source, None, adapter, 2_000_000_000)
    merged = merge_base.merged("dequantized", {"merge": target})
    if target == "nf4":
        quantize_checkpoint(merged, out, merge_base.config)
    else:
        out.mkdir()
        write_dense(merge_base, merged, out, closest_dtype(merged, merge_base.blueprint.tensors)[0])
size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
figures = {"seconds": time.monotonic() - started, "extra_peak_rss_bytes": peak() - before, "written_bytes": size}
print(json.dumps(figures))
"""


def measure() -> dict[str, Any]:
    """By target: seconds, peak memory beyond the imports, bytes written; the sizes of model and largest tensor.

    And what a merge keeps of adapters of `stories260K`.
    """
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.compiler.set_stance("force_eager"):
        quantized, adapter, sizes = _prepare(Path(folder))
        targets = {target: _run(quantized, adapter, Path(folder) / f"merged-{target}", target) for target in TARGETS}
        stories = measure_stories()
    return {**sizes, "targets": targets, "stories260K": stories}


def _run(quantized: Path, adapter: Path, out: Path, target: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, str(quantized), str(adapter), str(out), target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _prepare(folder: Path) -> tuple[Path, Path, dict[str, int]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
        )
    )
    sizes = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "float32_bytes": sum(4 * parameter.numel() for parameter in model.parameters()),
        "largest_tensor_bytes": max(4 * parameter.numel() for parameter in model.parameters()),
    }
    model.save_pretrained(folder / "base")
    del model
    train_tokenizer(["a b c"], vocab_size=300, max_tokens=128).save_pretrained(folder / "base")
    quantize_checkpoint(folder / "base", folder / "nf4", QuantizeConfig())
    made = get_peft_model(
        load_quantized(folder / "nf4", device="cpu", residency="scratch"), LoraConfig(r=16, target_modules="all-linear")
    )
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    made.save_pretrained(str(folder / "adapter"))
    return folder / "nf4", folder / "adapter", sizes
