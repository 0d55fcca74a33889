"""Proof that a model is quantized exactly where it should be: a loaded one, or one seen by its files' headers alone.

Knows bitsandbytes' layers and the names it stores them by; reads no file.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_core.errors import ModelError
from qlora_core.quantization.checkpoint import StoredTensor


@dataclass(frozen=True)
class StorageFormat:
    """How Linear weights are stored. `blocksize` None accepts any; `skip_modules` are kept as they were."""

    quant_type: str
    double_quant: bool
    skip_modules: tuple[str, ...]
    blocksize: int | None


def linear_modules(model: PreTrainedModel, skip_modules: Sequence[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every Linear (and GPT-2's Conv1D) that is to be quantized, by name; transformers' own rule of skipping."""
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and should_convert_module(name, list(skip_modules)):
            yield name, module


def audit_quantized(model: PreTrainedModel, wanted: StorageFormat) -> list[str]:
    """Names of the 4-bit modules, after every Linear was checked against `wanted`.

    Raises:
        ModelError: a Linear that should be 4-bit is not, is stored in another format, or something else is 4-bit.
    """
    expected = dict(linear_modules(model, wanted.skip_modules))
    faults = [f"{name}: {fault}" for name, module in expected.items() for fault in _faults(module, wanted)]
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if isinstance(parameter, Params4bit) and owner not in expected:
            faults.append(f"{name}: stored in 4 bits, though it must stay in full precision")
    if not expected:
        faults.append("the model has no Linear module to quantize")
    _refuse(faults, wanted)
    return list(expected)


def audit_headers(
    written: Mapping[str, StoredTensor],
    quantized: Mapping[str, Sequence[int]],
    kept: Mapping[str, StoredTensor],
    wanted: StorageFormat,
) -> None:
    """Check the headers of a 4-bit checkpoint: these weights are 4-bit, those are as they were, and nothing else is.

    `quantized` maps names of weights to their shapes, `kept` names of all others to what the source's headers say.

    Raises:
        ModelError: with the first faults.
    """
    faults: list[str] = []
    for name, shape in quantized.items():
        faults += [f"{name}: {fault}" for fault in _header_faults(name, shape, written, wanted)]
    for name, source in kept.items():
        found = written.get(name)
        if found is None or (found.dtype, found.shape) != (source.dtype, source.shape):
            now = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            faults.append(f"{name}: is {now}, and {source.dtype} {list(source.shape)} in the source")
    owned = {f"{name}.{part}" for name in quantized for part in _stored_parts(wanted)}
    faults += [f"{name}: nobody asked for it" for name in written.keys() - owned - quantized.keys() - kept.keys()]
    _refuse(faults, wanted)


def _refuse(faults: Sequence[str], wanted: StorageFormat) -> None:
    if faults:
        raise ModelError(
            f"the quantized model is not what was asked for ({wanted.quant_type}, blocksize {wanted.blocksize}, double "
            f"quantization {wanted.double_quant}); {len(faults)} faults, the first: {'; '.join(faults[:3])}; "
            "quantize the base again"
        )


def _stored_parts(wanted: StorageFormat) -> tuple[str, ...]:
    nested = ("nested_absmax", "nested_quant_map") if wanted.double_quant else ()
    return ("absmax", "quant_map", *nested, f"quant_state.bitsandbytes__{wanted.quant_type}")


def _header_faults(
    name: str, shape: Sequence[int], written: Mapping[str, StoredTensor], wanted: StorageFormat
) -> Iterator[str]:
    missing = [part for part in ("", *_stored_parts(wanted)) if f"{name}.{part}".rstrip(".") not in written]
    if missing:
        yield f"lacks {', '.join(part or 'its codes' for part in missing)}"
        return
    codes, absmax = written[name], written[f"{name}.absmax"]
    if codes.dtype != "U8" or math.prod(codes.shape) != -(-math.prod(shape) // 2):
        yield f"codes are {codes.dtype} {list(codes.shape)}, which is not half a byte for each of {list(shape)}"
    if absmax.dtype != ("U8" if wanted.double_quant else "F32"):
        yield f"absmax is {absmax.dtype}, with double quantization {wanted.double_quant}"
    if wanted.blocksize is not None and math.prod(absmax.shape) != -(-math.prod(shape) // wanted.blocksize):
        yield f"{math.prod(absmax.shape)} absmax are not one for each {wanted.blocksize} weights of {list(shape)}"


def _faults(module: torch.nn.Module, wanted: StorageFormat) -> Iterator[str]:
    weight = module.weight
    if not isinstance(module, Linear4bit) or not isinstance(weight, Params4bit):
        yield f"is a {type(module).__name__} of {weight.dtype}, not 4-bit"
        return
    state = weight.quant_state
    if not weight.bnb_quantized or state is None:
        yield "its weight was never quantized"
        return
    if state.quant_type != wanted.quant_type:
        yield f"stored as {state.quant_type}, not {wanted.quant_type}"
    if wanted.blocksize is not None and state.blocksize != wanted.blocksize:
        yield f"blocksize {state.blocksize}, not {wanted.blocksize}"
    if state.nested != wanted.double_quant:
        yield f"double quantization is {state.nested}, not {wanted.double_quant}"
    if weight.dtype != torch.uint8:
        yield f"codes are stored as {weight.dtype}, not torch.uint8"
