"""Proof that a loaded model is quantized exactly where it should be. Knows bitsandbytes' layers, and no files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_core.errors import ModelError


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
    if faults:
        raise ModelError(
            f"the quantized model is not what was asked for ({wanted.quant_type}, blocksize {wanted.blocksize}, double "
            f"quantization {wanted.double_quant}); {len(faults)} faults, the first: {'; '.join(faults[:3])}; "
            "quantize the base again"
        )
    return list(expected)


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
