"""One adapter in the form that stock PEFT, vLLM and SGLang read alike, and a report of who can serve it.

alpha = r with the scale folded into B, no rsLoRA flag, no patterns, plain start, one rank: readers that know no more
than alpha / r compute what was trained. What such readers would drop without a word is refused before. Limits of other
programs are theirs at the versions named; this module runs none of them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from qlora_core.adapters.adapter_folder import (
    AdapterFolder,
    CanonicalWriter,
    adapter_digest,
    common_targets,
    copy_companions,
    open_adapter,
)
from qlora_core.adapters.on_base import check_on_base, golden_prompts_of, write_same_answers
from qlora_core.digest import digest_files
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import GOLDEN_LOGITS_FILE, GOLDEN_PROMPTS_FILE, PARENTS_KEY, PROVENANCE_FILE
from qlora_core.quantization.checkpoint import TOKENIZER_FILES

REPORT_FILE = "portability.json"
VLLM_DEFAULT_RANK = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` of vLLM takes; an adapter needs the next one up from its rank."""
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def export_canonical(source: Path, out: Path, *, base: Path | None = None, rank: int | None = None) -> dict[str, Any]:
    """Write the adapter in `source` to the new folder `out` in canonical form; returns its `portability.json`.

    `base`: its 4-bit base, on which the fit is checked, and that source and export answer alike, which makes the golden
    logits; without it the source's own golden files are copied. `rank`: zero-pad up to this one (some programs compute
    fixed ranks), default the largest in use.
    The report: {"rank", "dtype", "target_modules", "largest_factor", "fits_float16", "chat_template_digest",
    "readers": {name: {"ok", "needs", "why"}}, "source_digest", "adapter_digest", "largest_logit_difference"}.

    Raises:
        ModelError: DoRA, biases, embeddings, fully trained modules, NaN, or an adapter on top of another, by name;
            an export that answers other than its source.
        ConfigError: `out` is taken, or the rank too small.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; name a new folder for the export")
    adapter = open_adapter(source)
    if adapter.provenance.get(PARENTS_KEY):
        raise ModelError(f"{source} was trained on top of other adapters; fuse them first with `qlora compose`")
    check_on_base(base, [adapter])
    largest = max(adapter.rank(module) for module in adapter.modules)
    if rank is not None and rank < largest:
        raise ConfigError(
            f"rank {rank} is under the adapter's {largest}; compress it with `qlora compose`, rank: {rank}"
        )
    stage = out.with_name(f".{out.name}.staging")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        CanonicalWriter(adapter.modules, rank or largest, common_targets([adapter]), adapter.factors).write(stage)
        difference = _write_companions(adapter, stage, base)
        report = _report(adapter, stage, rank or largest) | {"largest_logit_difference": difference}
        (stage / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        stage.replace(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return report


def portability(rank: int, modules: tuple[str, ...], largest: float) -> dict[str, dict[str, Any]]:
    """Who can read a canonical adapter: by reader {"ok", "needs" (settings), "why" (reasons against)}.

    `largest` is the largest magnitude of any factor: a reader that casts adapters to float16 turns those beyond 65504
    into infinity.
    """
    overflow = [] if largest <= torch.finfo(torch.float16).max else ["factors overflow float16; serve in bfloat16"]
    head = [f"LoRA on {name}" for name in modules if name.rpartition(".")[2] in ("lm_head", "embed_tokens")]
    next_rank = next((each for each in VLLM_RANKS if each >= rank), None)
    needs = [] if rank <= VLLM_DEFAULT_RANK else [f"--max-lora-rank {next_rank}"]
    too_wide = [f"rank {rank} is over {VLLM_RANKS[-1]}"] if next_rank is None else []
    return {
        "peft": {"ok": True, "needs": [], "why": []},
        "vllm": {"ok": not (too_wide or head), "needs": needs, "why": too_wide + head + overflow},
        "sglang": {"ok": not head, "needs": [f"--max-lora-rank {rank}"], "why": head + overflow},
        "gguf": {
            "ok": False,
            "needs": [],
            "why": [
                "no converter of adapters is on the package index: `gguf` reads and writes the container only; "
                "llama.cpp's convert_lora_to_gguf.py does it from this folder, in a checkout of its own"
            ],
        },
    }


def _write_companions(adapter: AdapterFolder, folder: Path, base: Path | None) -> float | None:
    """What lies beside the weights; returns the largest difference from the source's logits, None without a base."""
    copy_companions(adapter.path, folder)
    card = {key: value for key, value in adapter.provenance.items() if key != "params"}
    card |= {"exported_from": adapter.digest}
    (folder / PROVENANCE_FILE).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if base is not None:
        return write_same_answers(base, folder, adapter.path)
    if golden_prompts_of([adapter.path]) and (adapter.path / GOLDEN_PROMPTS_FILE).is_file():
        for name in (GOLDEN_PROMPTS_FILE, GOLDEN_LOGITS_FILE):
            shutil.copyfile(adapter.path / name, folder / name)
    return None


def _report(adapter: AdapterFolder, folder: Path, rank: int) -> dict[str, Any]:
    largest = 0.0
    for module in adapter.modules:
        update = adapter.factors(module)
        largest = max(largest, update.a_ri.abs().max().item(), update.b_or.abs().max().item())
    templates = {name: folder / name for name in (*_TEMPLATES, "tokenizer_config.json") if (folder / name).is_file()}
    tokenizer = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return {
        "format": 1,
        "rank": rank,
        "dtype": "float32",
        "target_modules": common_targets([adapter]),
        "modules": len(adapter.modules),
        "largest_factor": largest,
        "fits_float16": largest <= torch.finfo(torch.float16).max,
        "chat_template_digest": digest_files(templates) if templates else None,
        "tokenizer_digest": digest_files(tokenizer) if tokenizer else None,
        "readers": portability(rank, adapter.modules, largest),
        "source_digest": adapter.digest,
        "adapter_digest": adapter_digest(folder),
    }
