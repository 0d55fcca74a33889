"""Decides how each 4-bit layer of a loaded model executes, from memory and settings. Knows nothing of training.

Order: the largest layers become dense first. What a dense layer saves each step, and what it costs in memory, both grow
with its number of weights, so no layer is a better bargain than another; but what is left over shares one scratch
buffer as large as the largest of them, and that is smallest when the largest are dense.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit

from qlora_core.available_memory import available_memory_bytes
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.residency.layers import BITSANDBYTES_TYPES, LAYERS, Residency, set_residency

WANTED = ("auto", *LAYERS)
AUTO_SHARE = 0.5
"""Of the memory that is free, what `auto` takes for weights: activations, adapters and optimizer need theirs."""


@dataclass(frozen=True)
class _Layer:
    name: str
    type: str
    size_bytes: int  # of the dequantized weight, in the compute dtype


def plan_residency(
    model: torch.nn.Module,
    available_bytes: int | None,
    wanted: str = "auto",
    layer_residency: Mapping[str, str] | None = None,
) -> dict[str, Residency]:
    """How each 4-bit layer is to execute, by its name; empty for a model that has none.

    `available_bytes` is what dense weights and the scratch may take beyond what is loaded; None: nobody knows, and
    "auto" is "scratch". With "auto" as many layers as fit are dense and the rest take the scratch; where not even a
    layer's scratch fits, bitsandbytes runs it if it has kernels for its type. `layer_residency` maps patterns of layer
    names (`*.down_proj`) to a residency that goes before all that; the first pattern that matches counts.

    Raises:
        ConfigError: an unknown residency, or a pattern that matches no layer.
        ModelError: the layers that are to be dense do not fit, or bitsandbytes has no kernels for a type.
    """
    layers = list(_layers(model))
    chosen = _by_pattern(layers, layer_residency or {})
    _check_known(wanted, WANTED)
    if not layers:
        return {}
    free = [layer for layer in layers if layer.name not in chosen]
    if wanted == "auto":
        taken = sum(layer.size_bytes for layer in layers if chosen.get(layer.name) == "dense")
        scratch = max((layer.size_bytes for layer in layers if chosen.get(layer.name) == "scratch"), default=0)
        chosen |= _by_memory(free, None if available_bytes is None else available_bytes - taken, scratch)
    else:
        chosen |= {layer.name: cast(Residency, wanted) for layer in free}
    _check_runnable(layers, chosen, available_bytes)
    return {layer.name: chosen[layer.name] for layer in layers}


def memory_for_weights(device: str, wanted: str, sharers: int = 1) -> int | None:
    """What `plan_residency` may take on a device: all that is free, half of it for "auto"; in bytes.

    Each of `sharers` processes that load at the same time gets an equal part. None where the system does not say.
    """
    available = available_memory_bytes(device)
    if available is None:
        return None
    return int(available * (AUTO_SHARE if wanted == "auto" else 1)) // sharers


def apply_residency(model: torch.nn.Module, plan: Mapping[str, Residency], dtype: torch.dtype) -> None:
    """Let each layer of the plan execute as it says and compute in `dtype`; the model is changed in place.

    The dense ones come last: what they take must not stand in the way of the scratch.
    """
    for name, residency in sorted(plan.items(), key=lambda item: item[1] == "dense"):
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear4bit)
        set_residency(layer, residency, dtype)


def _by_memory(layers: Sequence[_Layer], room: int | None, scratch: int) -> dict[str, Residency]:
    """`room` is for dense weights and the scratch, of which `scratch` bytes are needed whatever is chosen here."""
    if room is None:
        return {layer.name: "scratch" for layer in layers}
    order = sorted(layers, key=lambda layer: -layer.size_bytes)
    chosen: dict[str, Residency] = {}
    for place, layer in enumerate(order):
        largest_of_rest = order[place + 1].size_bytes if place + 1 < len(order) else 0
        if layer.size_bytes + max(scratch, largest_of_rest) <= room:
            chosen[layer.name] = "dense"
            room -= layer.size_bytes
        elif layer.size_bytes <= max(scratch, room) or layer.type not in BITSANDBYTES_TYPES:
            chosen[layer.name] = "scratch"
            scratch = max(scratch, layer.size_bytes)
        else:
            chosen[layer.name] = "bitsandbytes"
    return chosen


def _by_pattern(layers: Sequence[_Layer], patterns: Mapping[str, str]) -> dict[str, Residency]:
    chosen: dict[str, Residency] = {}
    for pattern, residency in patterns.items():
        _check_known(residency, tuple(LAYERS))
        matching = [layer.name for layer in layers if fnmatchcase(layer.name, pattern)]
        if not matching:
            examples = ", ".join(layer.name for layer in layers[:3]) or "none"
            raise ConfigError(
                f"compute.layer_residency: {pattern!r} matches none of the {len(layers)} 4-bit layers (the first: "
                f"{examples}); correct or remove it"
            )
        for name in matching:
            chosen.setdefault(name, cast(Residency, residency))
    return chosen


def _check_known(residency: str, known: Sequence[str]) -> None:
    if residency not in known:
        raise ConfigError(f"residency {residency!r} is unknown; choose {', '.join(known)}")


def _check_runnable(layers: Sequence[_Layer], chosen: Mapping[str, Residency], room: int | None) -> None:
    unrunnable = [layer for layer in layers if chosen[layer.name] == "bitsandbytes"]
    unrunnable = [layer for layer in unrunnable if layer.type not in BITSANDBYTES_TYPES]
    if unrunnable:
        raise ModelError(
            f"bitsandbytes cannot run {len(unrunnable)} layers stored as {unrunnable[0].type}, the first: "
            f"{unrunnable[0].name}; it has kernels for {' and '.join(BITSANDBYTES_TYPES)}; set compute.residency to "
            "auto, dense or scratch"
        )
    needed = sum(layer.size_bytes for layer in layers if chosen[layer.name] == "dense")
    if room is not None and needed > room:
        raise ModelError(
            f"{sum(way == 'dense' for way in chosen.values())} of {len(layers)} layers are to be dense, which takes "
            f"{needed} bytes, and {room} are available; set compute.residency to auto or scratch"
        )


def _layers(model: torch.nn.Module) -> Iterator[_Layer]:
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            state = weight.quant_state
            itemsize = (module.compute_dtype or torch.float32).itemsize
            yield _Layer(name, state.quant_type, math.prod(state.shape) * itemsize)
