"""Turns a checkpoint into a 4-bit checkpoint folder, tensor by tensor, with never more than a few tensors in memory.

For nf4 and fp4 the folder is bitsandbytes' own format as transformers writes it, so that stock
`AutoModelForCausalLM.from_pretrained` loads it. e2m1 and int4 have the same form and another `quant_method`, which
stock transformers refuses and `load_quantized` reads. This module says what belongs into the folder besides weights,
proves it, and publishes it whole; a killed run goes on at its last finished shard. Knows nothing of stages.
"""

import importlib.metadata
import json
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import BitsAndBytesConfig, GenerationConfig

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.digest import digest_json
from qlora_core.errors import ModelError, StoreError
from qlora_core.progress import progress_bar
from qlora_core.quantization.audit import StorageFormat, audit_headers, linear_modules
from qlora_core.quantization.blueprint import Blueprint, draw_blueprint
from qlora_core.quantization.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    read_safetensors_header,
    read_tensors,
    tokenizer_files,
)
from qlora_core.quantization.own_types import OWN_METHOD, OWN_TYPES
from qlora_core.quantization.resume import ShardRecord, WorkFolder, open_work
from qlora_core.quantization.safetensors_file import digest_tensor
from qlora_core.quantization.shard import Quantizer, Shard, digest_source, plan_shards, write_shard
from qlora_core.quantization.tensor_source import LocalSource, TensorSource
from qlora_core.store.contents import sync_to_disk
from qlora_core.store.manifest import DISTRIBUTION

REPORT_FILE = "quantization.json"
_SETTINGS = ("type", "blocksize", "double_quant", "skip_modules", "max_shard_bytes")
logger = logging.getLogger(__name__)


def quantize_checkpoint(
    source: Path | TensorSource,
    out: Path,
    config: QuantizeConfig,
    *,
    work: Path | None = None,
    quantizer: Quantizer | None = None,
) -> dict[str, Any]:
    """Quantize the Linear weights of `source` into the new or empty folder `out`; returns its `quantization.json`.

    Output embeddings stay in full precision whatever `skip_modules` says, as do embeddings, norms and biases. Tokenizer
    files are copied. `out` appears whole or not at all; until then everything is in the folder `work`, by default one
    beside `out` that is named by source and settings, where the same call finds finished shards again after its process
    was killed or the disk was full. It is removed when `out` stands, or when the source is found unusable. `quantizer`
    replaces rounding to nearest (see `write_shard`); the source's `identity` must tell it from others.

    The report: `parameters` (all, tied ones once); `bits_per_parameter` (see there); `relative_l2` (norm of the error
    over the norm of the weights, all quantized weights together); `layers` (the same by layer, with the largest
    absolute error); `kept` (parameters in full precision); `type`, `blocksize`, `double_quant`; `device` and
    `bitsandbytes` that made it; `shards` (files of weights) and `resumed_shards` (of them, made by an earlier run);
    `source_bytes` and `written_bytes` of the weights; `seconds`; `peak_rss_bytes` of the process.

    Raises:
        ModelError: the source is unusable (see `check_checkpoint` and `draw_blueprint`), or holds NaN or infinity; a
            written tensor reads back differently; `out` is not empty.
        ConfigError: another process is at the same work. StoreError: the disk refuses.
    """
    started = time.monotonic()
    origin = LocalSource(source) if isinstance(source, Path) else source
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} already exists and is not empty; name a new folder for the quantized checkpoint")
    blueprint = draw_blueprint(origin, config)
    _check_duplicates(origin, blueprint)
    plan = _plan(origin, config)
    folder = work or out.parent / f".{out.name}-{digest_json(plan)[:16]}"
    with _disk_errors_named(origin, out, folder), open_work(folder, plan) as held:
        try:
            report = _quantize_into(held, origin, blueprint, config, started, quantizer)
        except ModelError:
            held.discard()  # no later run could use it
            raise
        _publish(held, out)
    logger.info("Quantized %s: %.3f bits per parameter", origin.location, report["bits_per_parameter"])
    return report


def bits_per_parameter(folder: Path, shapes: Mapping[str, Sequence[int]]) -> float:
    """Bits in the written files per quantized weight: 4-bit codes, absmax, and nested absmax; code tables left out.

    With double quantization at blocksize 64 that is 4 + 8/64 + 32/(64*256) = 4.127, without it 4 + 32/64 = 4.5, plus
    what rounding up to whole blocks adds to small weights. `shapes`: name of a weight in the files to its shape.
    """
    tensors = read_tensors(folder)
    written = (tensors.get(f"{name}{part}") for name in shapes for part in ("", ".absmax", ".nested_absmax"))
    size_bytes = sum(tensor.size_bytes for tensor in written if tensor)
    return 8 * size_bytes / sum(math.prod(shape) for shape in shapes.values())


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def quantization_settings(storage: StorageFormat) -> dict[str, Any]:
    """The `quantization_config` of a 4-bit checkpoint's config.json, in transformers' form.

    An own type has its own `quant_method`, and none of the `load_in_...` keys: they alone would make transformers take
    it for bitsandbytes'.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=storage.quant_type,
        bnb_4bit_use_double_quant=storage.double_quant,
        bnb_4bit_compute_dtype=torch.float32,  # works on any device; `load_quantized` sets the device's own
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=list(storage.skip_modules),
    ).to_dict()
    if storage.quant_type in OWN_TYPES:
        settings = {key: value for key, value in settings.items() if "load_in_" not in key}
        settings["quant_method"] = OWN_METHOD
    return settings


def _plan(source: TensorSource, config: QuantizeConfig) -> dict[str, Any]:
    """What finished shards depend on, besides the weights' values."""
    versions = {name: importlib.metadata.version(name) for name in (DISTRIBUTION, "bitsandbytes", "transformers")}
    settings = config.model_dump(mode="json", include=set(_SETTINGS))
    return {"source": dict(source.identity), "settings": settings, "versions": versions}


def _check_duplicates(source: TensorSource, blueprint: Blueprint) -> None:
    for first, second in blueprint.duplicates:
        if digest_tensor(source.read(first)) != digest_tensor(source.read(second)):
            raise ModelError(
                f"{source.location}: config.json ties {first} to {second}, and the two hold different values; set "
                "tie_word_embeddings to false in it, or remove one of them from the checkpoint"
            )


def _quantize_into(
    work: WorkFolder,
    source: TensorSource,
    blueprint: Blueprint,
    config: QuantizeConfig,
    started: float,
    quantizer: Quantizer | None,
) -> dict[str, Any]:
    shards = plan_shards(source, blueprint.tensors, config)
    records, resumed = _write_shards(work, source, shards, config, quantizer)
    _write_side_files(work.files, source, blueprint)
    if len(shards) > 1:
        _write_index(work.files, blueprint)
    shapes = _audit(work.files, source, blueprint)
    report = {
        "parameters": blueprint.parameters,
        "bits_per_parameter": bits_per_parameter(work.files, shapes),
        **_errors(records, blueprint),
        "kept": _kept(blueprint),
        "type": config.type,
        "blocksize": config.blocksize,
        "double_quant": config.double_quant,
        "device": "cpu",
        "bitsandbytes": bitsandbytes.__version__,
        "shards": len(shards),
        "resumed_shards": resumed,
        "source_bytes": sum(source.tensors[tensor.source].size_bytes for tensor in blueprint.tensors),
        "written_bytes": sum((work.files / record.file).stat().st_size for record in records),
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    (work.files / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _write_shards(
    work: WorkFolder,
    source: TensorSource,
    shards: Sequence[Shard],
    config: QuantizeConfig,
    quantizer: Quantizer | None,
) -> tuple[list[ShardRecord], int]:
    """The records of all shards in order, and how many of them an earlier run had finished."""
    records: list[ShardRecord] = []
    resumed = 0
    with progress_bar("Quantizing", sum(len(shard.tensors) for shard in shards)) as advance:
        for number, shard in enumerate(shards, start=1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            record = work.finished(name, lambda shard=shard: digest_source(source, shard))
            if record is None:
                record = write_shard(source, shard, config, work.files / name, advance, quantizer)
                work.keep(record)
            else:
                resumed += 1
                advance(len(shard.tensors))
            records.append(record)
    if resumed:
        logger.info("%d of %d shards were finished by an earlier run and are used as they are", resumed, len(shards))
    return records, resumed


def _write_side_files(folder: Path, source: TensorSource, blueprint: Blueprint) -> None:
    model = blueprint.model
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = quantization_settings(blueprint.storage)
    model.config.save_pretrained(folder)
    extra = tokenizer_files(source.folder)
    generation = source.folder / "generation_config.json"
    if generation.is_file():
        # As it is: transformers refuses to save settings it finds inconsistent
        extra["generation_config.json"] = generation
    elif model.can_generate():
        GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    for name, path in extra.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)


def _write_index(folder: Path, blueprint: Blueprint) -> None:
    headers = {path.name: read_safetensors_header(path) for path in sorted(folder.glob("model-*.safetensors"))}
    size = sum(tensor.size_bytes for header in headers.values() for tensor in header.values())
    index = {
        "metadata": {"total_parameters": blueprint.parameters, "total_size": size},
        "weight_map": {name: file for file, header in headers.items() for name in header},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _audit(folder: Path, source: TensorSource, blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The shapes of the quantized weights by their names in the files, after the files' headers were checked."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in blueprint.tensors:
        if tensor.quantized:
            shape = source.tensors[tensor.source].shape
            shapes[tensor.written] = shape[::-1] if tensor.transposed else shape
    kept = {tensor.written: source.tensors[tensor.source] for tensor in blueprint.tensors if not tensor.quantized}
    audit_headers(read_tensors(folder), shapes, kept, blueprint.storage)
    crossing = sum(shape[-1] % (blueprint.storage.blocksize or 1) != 0 for shape in shapes.values())
    if crossing and blueprint.storage.quant_type not in OWN_TYPES:
        logger.warning(
            "%d of %d layers have an in_features that is no multiple of the blocksize %d. bitsandbytes alone computes "
            "them wrongly on CPUs with AVX-512; qlora's own loader and CUDA do not.",
            crossing, len(shapes), blueprint.storage.blocksize,
        )  # fmt: skip
    return shapes


def _errors(records: Sequence[ShardRecord], blueprint: Blueprint) -> dict[str, Any]:
    """`relative_l2` over all layers, and `layers` in the model's order."""
    found = {layer["name"]: layer for record in records for layer in record.layers}
    layers = [found[name] for name, _ in linear_modules(blueprint.model, blueprint.storage.skip_modules)]
    squares = sum(layer["squares"] for layer in layers)
    whole = math.sqrt(sum(layer["error_squares"] for layer in layers) / squares) if squares else 0.0
    told = ("name", "shape", "relative_l2", "max_error")
    return {"relative_l2": whole, "layers": [{key: layer[key] for key in told} for layer in layers]}


def _kept(blueprint: Blueprint) -> list[str]:
    quantized = {tensor.name for tensor in blueprint.tensors if tensor.quantized}
    return [name for name, _ in blueprint.model.named_parameters() if name not in quantized]


def _publish(work: WorkFolder, out: Path) -> None:
    """Put the finished files to `out`: by one rename where nothing stands there, else into the empty folder."""
    for path in work.files.rglob("*"):
        sync_to_disk(path)
    sync_to_disk(work.files)
    if out.exists():
        for path in work.files.iterdir():
            shutil.move(path, out / path.name)
    else:
        work.files.rename(out)
        sync_to_disk(out.parent)
    work.discard()


@contextmanager
def _disk_errors_named(source: TensorSource, out: Path, work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # our own
            raise
        raise StoreError(
            f"quantizing {source.location} to {out} stopped: {error}; free space or allow writing, then run the same "
            f"command again: it goes on with the shards it has finished in {work}"
        ) from error
