"""Loads the frozen base model, quantized or plain, on the device at hand and in the precision it computes well in.

Knows nothing of adapters or of how the checkpoint came to be.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import PreTrainedModel

from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.residency.plan import apply_residency, memory_for_weights, plan_residency
from qlora_core.quantization.audit import StorageFormat, audit_quantized
from qlora_core.quantization.checkpoint import check_checkpoint, is_quantized, read_model_config, read_tensors
from qlora_core.quantization.loading import load_model
from qlora_core.quantization.own_types import has_own_type, own_config

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device() -> str:
    """`cuda` where torch can use a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_precision(precision: str, device: str) -> torch.dtype:
    """The compute dtype that a precision setting means on a device.

    `auto` is bfloat16 on GPUs that have it in hardware, else float32. On a CPU it is float32 always: bitsandbytes' bf16
    path there rounds the stored constants too, and where bf16 is emulated it is 60 to 100 times slower.

    Raises:
        ConfigError: the setting is none of auto, float32, bfloat16.
    """
    if precision == "auto":
        native = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown; choose auto, {' or '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def load_quantized(
    folder: Path,
    *,
    precision: str = "auto",
    device: str | None = None,
    residency: str = "auto",
    layer_residency: Mapping[str, str] | None = None,
    memory_sharers: int = 1,
) -> PreTrainedModel:
    """The 4-bit base of a folder that `quantize_checkpoint` wrote: frozen, in eval mode, its cache off.

    Linear layers compute in the chosen precision, and the other parameters are cast to it; position tables stay as
    the model made them. `device` None chooses one. Every Linear is audited against the folder's config. How the 4-bit
    layers execute is planned by `plan_residency` from `residency`, `layer_residency` and the memory that is free, of
    which each of `memory_sharers` processes that load on the same device takes its part.

    Raises:
        ModelError: the folder holds no 4-bit checkpoint, or not the one its config describes; or see `plan_residency`.
        ConfigError: an unknown precision or residency.
    """
    wanted = _stored_format(folder)
    read_tensors(folder)  # names a truncated file before transformers trips over it
    device = device or choose_device()
    dtype = choose_precision(precision, device)
    # The dtype of the checkpoint is kept while loading: a dtype given here would also be put on the fp32 absmax
    own_type = has_own_type(read_model_config(folder)["quantization_config"])
    model = load_model(folder, device_map={"": device}, **({"config": own_config(folder)} if own_type else {}))
    audit_quantized(model, wanted)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if not isinstance(parameter, Params4bit) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
    room = memory_for_weights(device, residency, memory_sharers)
    plan = plan_residency(model, room, residency, layer_residency)
    apply_residency(model, plan, dtype)
    logger.info("%s: %s", folder, ", ".join(f"{count} layers {way}" for way, count in Counter(plan.values()).items()))
    return _ready(model)


def load_plain(folder: Path, *, precision: str = "auto", device: str | None = None) -> PreTrainedModel:
    """An unquantized checkpoint in the chosen precision: frozen, in eval mode, its cache off.

    Raises:
        ModelError: see `check_checkpoint`.
    """
    check_checkpoint(folder)
    device = device or choose_device()
    model = load_model(folder, dtype=choose_precision(precision, device), device_map={"": device})
    return _ready(model.requires_grad_(False))


def load_any(folder: Path, *, precision: str = "auto", device: str | None = None) -> PreTrainedModel:
    """`load_quantized` or `load_plain`, whichever the folder's config asks for."""
    load = load_quantized if is_quantized(folder) else load_plain
    return load(folder, precision=precision, device=device)


def _stored_format(folder: Path) -> StorageFormat:
    """What a 4-bit folder says of itself: settings in its config, the blocksize in its report if there is one."""
    settings = read_model_config(folder).get("quantization_config")
    if not isinstance(settings, dict) or not (settings.get("load_in_4bit") or has_own_type(settings)):
        raise ModelError(f"{folder} is no bitsandbytes 4-bit checkpoint; make one with `qlora quantize SOURCE TARGET`")
    report = folder / "quantization.json"
    blocksize = json.loads(report.read_text(encoding="utf-8"))["blocksize"] if report.is_file() else None
    return StorageFormat(
        quant_type=settings["bnb_4bit_quant_type"],
        double_quant=settings["bnb_4bit_use_double_quant"],
        skip_modules=tuple(settings.get("llm_int8_skip_modules") or ()),
        blocksize=blocksize,
    )


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    # With a cache, rows packed by position ids would see each other, and training would hold memory for nothing
    model.config.use_cache = False
    return model.eval()
