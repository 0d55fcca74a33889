"""Turns a checkpoint folder into a 4-bit checkpoint folder that `AutoModelForCausalLM.from_pretrained` loads.

Weights are quantized by bitsandbytes and written by transformers, in their own format; this module decides what is
quantized, refuses what would be silently spoilt, measures the error and proves the written folder by loading it. It
loads the whole source into memory, and knows nothing of stages or stores.
"""

import json
import logging
import math
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError, StoreError
from qlora_core.progress import progress_bar
from qlora_core.quantization.audit import StorageFormat, audit_quantized, linear_modules
from qlora_core.quantization.checkpoint import (
    check_checkpoint,
    checkpoint_dtype,
    read_model_config,
    read_tensors,
    tokenizer_files,
)
from qlora_core.quantization.dequantize import blocks_cross_rows, dequantize_exact
from qlora_core.quantization.loading import load_model, without_bars

REPORT_FILE = "quantization.json"
_ROWS_TO_MEASURE = 1 << 22  # weights compared at a time, so that float64 copies stay small
logger = logging.getLogger(__name__)


def quantize_checkpoint(source: Path, out: Path, config: QuantizeConfig) -> dict[str, Any]:
    """Quantize the Linear weights of `source` into the new or empty folder `out`; returns its `quantization.json`.

    Output embeddings stay in full precision whatever `skip_modules` says, as do embeddings, norms and biases. Tokenizer
    files are copied. The caller publishes `out`: after an error it holds half a checkpoint. Quantizes on the GPU if
    there is one: its codes can differ from the CPU's where a weight lies on a threshold to the last bit.

    The report: `parameters` (all, tied ones once); `bits_per_parameter` (see there); `relative_l2` (norm of the error
    over the norm of the weights, all quantized weights together); `layers` (the same by layer, with the largest
    absolute error); `kept` (parameters in full precision); `type`, `blocksize`, `double_quant`; `device` and
    `bitsandbytes` that made it; `seconds`; `peak_rss_bytes` of the process.

    Raises:
        ModelError: the source is unusable (see `check_checkpoint`), no causal language model, or holds NaN or infinity;
            the written folder does not load back to the same values; `out` is not empty.
        StoreError: the disk refuses.
    """
    started = time.monotonic()
    check_checkpoint(source)
    check_architecture(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} already exists and is not empty; name a new folder for the quantized checkpoint")
    model = _load_source(source)
    wanted = _storage_format(model, config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = _quantize_linears(model, wanted)
    audit_quantized(model, wanted)
    _write(model, source, out)
    _prove(model, out, wanted)
    report = {
        "parameters": parameters,
        "bits_per_parameter": bits_per_parameter(out, {layer["name"]: layer["shape"] for layer in layers}),
        "relative_l2": _whole_error(layers),
        "layers": [{key: layer[key] for key in ("name", "shape", "relative_l2", "max_error")} for layer in layers],
        "kept": [name for name, value in model.named_parameters() if not isinstance(value, Params4bit)],
        "type": config.type,
        "blocksize": config.blocksize,
        "double_quant": config.double_quant,
        "device": _quantizing_device().type,
        "bitsandbytes": bitsandbytes.__version__,
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    (out / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    logger.info("Quantized %s: %.3f bits per parameter", source, report["bits_per_parameter"])
    return report


def check_architecture(folder: Path) -> None:
    """Refuse a checkpoint whose `model_type` this transformers has no causal language model for; no custom code is run.

    Raises:
        ModelError: with the type and the version of transformers.
    """
    config = read_model_config(folder)
    model_type = config["model_type"]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        custom = " It brings its own code (auto_map), which is never run." if "auto_map" in config else ""
        raise ModelError(
            f"{folder / 'config.json'}: model_type {model_type!r} is no causal language model of transformers "
            f"{transformers.__version__}.{custom} Name a base that is (llama, mistral, qwen2, gemma, ...)"
        )


def bits_per_parameter(folder: Path, shapes: dict[str, list[int]]) -> float:
    """Bits in the written files per quantized weight: 4-bit codes, absmax, and nested absmax; code tables left out.

    With double quantization at blocksize 64 that is 4 + 8/64 + 32/(64*256) = 4.127, without it 4 + 32/64 = 4.5, plus
    what rounding up to whole blocks adds to small weights. `shapes`: module name to the shape of its weight.
    """
    tensors = read_tensors(folder)
    stored = ("weight", "weight.absmax", "weight.nested_absmax")
    written = (tensors.get(f"{name}.{part}") for name in shapes for part in stored)
    size_bytes = sum(tensor.size_bytes for tensor in written if tensor)
    return 8 * size_bytes / sum(math.prod(shape) for shape in shapes.values())


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _load_source(source: Path) -> PreTrainedModel:
    model = load_model(source, dtype=getattr(torch, checkpoint_dtype(source)))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{source}: {name} holds NaN or infinity, which would spoil its blocks; repair the checkpoint"
            )
        if parameter.ndim == 3:
            raise ModelError(
                f"{source}: {name} has shape {list(parameter.shape)}: fused experts (mixture of experts) are no Linear "
                "that bitsandbytes stores in 4 bits; name a dense model"
            )
    return model.eval()


def _storage_format(model: PreTrainedModel, config: QuantizeConfig) -> StorageFormat:
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    skip_modules = (*config.skip_modules, *(name for name in heads if name not in config.skip_modules))
    return StorageFormat(config.type, config.double_quant, skip_modules, config.blocksize)


def _quantize_linears(model: PreTrainedModel, wanted: StorageFormat) -> list[dict[str, Any]]:
    """Replace every Linear by its 4-bit form, in place, one at a time; returns name, shape and error of each."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=wanted.quant_type,
        bnb_4bit_use_double_quant=wanted.double_quant,
        bnb_4bit_compute_dtype=torch.float32,  # works on any device; `load_quantized` sets the device's own
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=list(wanted.skip_modules),
    )
    sources = dict(linear_modules(model, wanted.skip_modules))
    replace_with_bnb_linear(model, modules_to_not_convert=list(wanted.skip_modules), quantization_config=settings)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    layers: list[dict[str, Any]] = []
    crossing = 0
    with progress_bar("Quantizing", len(sources)) as advance:
        for name in list(sources):
            module: Any = sources.pop(name)
            weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().contiguous()
            target: Any = model.get_submodule(name)
            if not isinstance(target, Linear4bit):
                kind = type(module).__name__
                raise ModelError(
                    f"{name} is a {kind}, which bitsandbytes cannot store; add it to quantize.skip_modules"
                )
            target.weight = _quantize_weight(weight, wanted, target)
            target.bias = module.bias
            crossing += blocks_cross_rows(target.weight.quant_state)
            layers.append({"name": name, "shape": list(weight.shape), **_measure(weight, target.weight)})
            advance(1)
    if crossing:
        logger.warning(
            "%d of %d layers have an in_features that is no multiple of the blocksize %d. bitsandbytes alone computes "
            "them wrongly on CPUs with AVX-512; qlora's own loader and CUDA do not.",
            crossing, len(layers), wanted.blocksize,
        )  # fmt: skip
    return layers


def _quantize_weight(weight: torch.Tensor, wanted: StorageFormat, module: Linear4bit) -> Params4bit:
    make: Any = Params4bit  # its signature is hidden behind torch.nn.Parameter's
    parameter = make(
        weight,
        requires_grad=False,
        blocksize=wanted.blocksize,
        compress_statistics=wanted.double_quant,
        quant_type=wanted.quant_type,
        quant_storage=torch.uint8,
        module=module,
    )
    return parameter.to(_quantizing_device()).to("cpu")


def _quantizing_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measure(weight: torch.Tensor, quantized: Params4bit) -> dict[str, float]:
    """Error of the stored weight against the source in float64: ratio, maximum, and the squares for the whole model."""
    # float32: the stored value itself, not its rounding to a 16-bit source dtype
    restored = dequantize_exact(quantized.data, quantized.quant_state, torch.float32).reshape(-1)
    squares = error_squares = largest = 0.0
    for start in range(0, weight.numel(), _ROWS_TO_MEASURE):
        exact = weight.reshape(-1)[start : start + _ROWS_TO_MEASURE].double()
        error = restored[start : start + _ROWS_TO_MEASURE].double() - exact
        squares += exact.square().sum().item()
        error_squares += error.square().sum().item()
        largest = max(largest, error.abs().max().item())
    ratio = math.sqrt(error_squares / squares) if squares else 0.0
    return {"relative_l2": ratio, "max_error": largest, "squares": squares, "error_squares": error_squares}


def _whole_error(layers: list[dict[str, Any]]) -> float:
    squares = sum(layer["squares"] for layer in layers)
    return math.sqrt(sum(layer["error_squares"] for layer in layers) / squares) if squares else 0.0


def _write(model: PreTrainedModel, source: Path, folder: Path) -> None:
    # transformers refuses to save generation settings it finds inconsistent; the base's own are copied as they are
    model.generation_config = GenerationConfig.from_model_config(model.config)
    try:
        with without_bars():
            model.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"the checkpoint cannot be written to {folder}: {error}; free space or allow writing"
        ) from error
    extra = tokenizer_files(source)
    generation = source / "generation_config.json"
    for name, path in ({"generation_config.json": generation} if generation.is_file() else {}).items() | extra.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _prove(model: PreTrainedModel, folder: Path, wanted: StorageFormat) -> None:
    """Load the written folder as any user would and compare every value with what was meant to be written."""
    loaded = load_model(folder, device_map={"": "cpu"})
    audit_quantized(loaded, wanted)
    restored = dict(loaded.named_parameters())
    for name, meant in model.named_parameters():
        found = restored.get(name)
        if found is None or not _same(meant, found):
            raise ModelError(f"{folder}: {name} reads back differently from what was written; check disk and versions")


def _same(meant: torch.Tensor, found: torch.Tensor) -> bool:
    if not torch.equal(meant.data, found.data):
        return False
    return not isinstance(meant, Params4bit) or _state_values(meant) == _state_values(found)


def _state_values(weight: Any) -> dict[str, Any]:
    """Everything that the codes' meaning hangs on, as plain values that compare to the bit."""
    values = weight.quant_state.as_dict()
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in values.items()}
