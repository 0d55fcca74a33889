"""A merged checkpoint in 16 bits, written tensor by tensor from a source; memory holds one tensor.

What the base holds in 4 bits is stored in 16. Everything else (embeddings, norms) keeps its own dtype: it was not
changed, and is not rounded. Knows dtypes and files; what the tensors are was decided before.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from qlora_core.adapters.merge_source import MergeBase
from qlora_core.errors import ModelError
from qlora_core.quantization.blueprint import PlannedTensor
from qlora_core.quantization.checkpoint import INDEX_FILE, SINGLE_FILE, is_float, tokenizer_files
from qlora_core.quantization.safetensors_file import StreamedFile, digest_tensor, read_back
from qlora_core.quantization.tensor_source import TensorSource

CANDIDATES = (torch.float16, torch.bfloat16)


def closest_dtype(source: TensorSource, tensors: Sequence[PlannedTensor]) -> tuple[torch.dtype, dict[str, float]]:
    """float16 or bfloat16, whichever is closer to the merged weights, and the relative error (L2) of each that fits.

    float16 has 8 times bfloat16's resolution and ends at 65504: it fits only a model all of whose tensors do, for
    loaders cast the others too.
    """
    errors, whole = dict.fromkeys(CANDIDATES, 0.0), 0.0
    for tensor in tensors:
        if not is_float(source.tensors[tensor.source]):
            continue
        value = source.read(tensor.source).float()
        if value.abs().max() > torch.finfo(torch.float16).max:
            errors[torch.float16] = math.inf
        if not tensor.quantized:
            continue
        whole += value.square().sum(dtype=torch.float64).item()
        for dtype in CANDIDATES:
            errors[dtype] += (value - value.to(dtype).float()).square().sum(dtype=torch.float64).item()
    fitting = {dtype: error for dtype, error in errors.items() if math.isfinite(error)}
    relative = {str(dtype).removeprefix("torch."): math.sqrt(error / whole) for dtype, error in fitting.items()}
    return min(fitting, key=lambda dtype: fitting[dtype]), relative


def write_dense(base: MergeBase, source: TensorSource, folder: Path, dtype: torch.dtype) -> None:
    """Write the tensors of `source` into `folder`, its 4-bit ones in `dtype`, with config and tokenizer.

    Raises:
        ModelError: a value overflows the dtype, or reads back otherwise than written.
    """
    shards = _plan(base, source, dtype)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(source, shard, folder / name, dtype)
        index |= {tensor.written: name for tensor in shard}
    if len(shards) > 1:
        content = {"metadata": {"total_parameters": base.blueprint.parameters}, "weight_map": index}
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_side_files(base, source, folder, dtype)


def _plan(base: MergeBase, source: TensorSource, dtype: torch.dtype) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in base.blueprint.tensors:
        stored = source.tensors[tensor.source]
        count = math.prod(stored.shape) * dtype.itemsize if tensor.quantized else stored.size_bytes
        if shards[-1] and size + count > base.config.max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += count
    return shards


def _write_shard(source: TensorSource, shard: Sequence[PlannedTensor], path: Path, dtype: torch.dtype) -> None:
    meant: dict[str, str] = {}
    with StreamedFile(path, [tensor.written for tensor in shard]) as file:
        for tensor in shard:
            value = source.read(tensor.source)
            if tensor.quantized:
                value = value.to(dtype).contiguous()
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ModelError(f"{tensor.name} holds NaN or infinity as {dtype}; nothing is written")
            meant[tensor.written] = digest_tensor(value)
            file.add(tensor.written, value)
        file.finish()
    read_back(path, meant)


def _write_side_files(base: MergeBase, source: TensorSource, folder: Path, dtype: torch.dtype) -> None:
    model: Any = base.blueprint.model
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    files: Mapping[str, Path] = tokenizer_files(source.folder)
    generation = source.folder / "generation_config.json"
    if generation.is_file():
        files = {**files, generation.name: generation}
    elif model.can_generate():
        GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
