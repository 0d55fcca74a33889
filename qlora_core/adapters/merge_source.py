"""A base seen as a plain checkpoint whose tensors can be read one by one, with an adapter's deltas added on the way.

So the streaming quantizer merges as it quantizes, and memory holds one layer. Knows names and weights, not targets.
Shapes, as suffixes of names: o out_features, i in_features.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from qlora_core.adapters.adapter_folder import AdapterFolder
from qlora_core.adapters.on_base import empty_model
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError
from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, from_stored_tensors
from qlora_core.quantization.blueprint import Blueprint, draw_blueprint
from qlora_core.quantization.checkpoint import PICKLE_SUFFIXES, StoredTensor, read_model_config, read_tensors
from qlora_core.quantization.tensor_source import TensorSource

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.")


class DequantizedSource:
    """A 4-bit folder as the plain checkpoint its values stand for; `folder` receives its files other than weights.

    Weights that are stored in 4 bits are read in float32, and are said to have the dtype they had before.
    """

    is_immutable = False

    def __init__(self, base: Path, folder: Path, identity: Mapping[str, str]) -> None:
        settings = read_model_config(base).get("quantization_config")
        if not isinstance(settings, dict) or not settings.get("load_in_4bit"):
            raise ModelError(
                f"{base} is no bitsandbytes 4-bit checkpoint; name the base that the adapter was trained on"
            )
        self.settings = settings
        self.location, self.folder, self.identity = str(base), folder, dict(identity)
        self._base = base
        self._stored = read_tensors(base)
        self._transposed = _transposed_names(base, self._stored)
        self.tensors: Mapping[str, StoredTensor] = {
            name: self._described(name, stored) for name, stored in self._stored.items() if not _is_part(name)
        }
        _copy_side_files(base, folder)

    def stored(self, name: str) -> QuantizedTensor:
        """A 4-bit weight [out_features, in_features] as it is stored."""
        names = [each for each in self._stored if each == name or each.startswith(f"{name}.")]
        tensors: dict[str, torch.Tensor] = {}
        for each in names:
            with safe_open(self._base / self._stored[each].file, framework="pt") as file:
                tensors[each] = file.get_tensor(each)
        return from_stored_tensors(name, tensors)

    def is_stored_in_4_bits(self, name: str) -> bool:
        """Whether the tensor of this name is."""
        return f"{name}.absmax" in self._stored

    def read(self, name: str) -> torch.Tensor:
        """The tensor as a plain checkpoint would hold it; GPT-2's layers as [in_features, out_features]."""
        if not self.is_stored_in_4_bits(name):
            with safe_open(self._base / self._stored[name].file, framework="pt") as file:
                return file.get_tensor(name)
        quantized = self.stored(name)
        weight_oi = dequantize_into(quantized, torch.empty(quantized.shape))
        return weight_oi.T if name in self._transposed else weight_oi

    def _described(self, name: str, stored: StoredTensor) -> StoredTensor:
        if not self.is_stored_in_4_bits(name):
            return stored
        state = next(each for each in self._stored if each.startswith(f"{name}.quant_state."))
        with safe_open(self._base / self._stored[state].file, framework="pt") as file:
            content = json.loads(bytes(file.get_tensor(state).tolist()))
        shape = tuple(content["shape"])
        shape = shape[::-1] if name in self._transposed else shape
        dtype = _DTYPES[getattr(torch, content["dtype"])]
        size = math.prod(shape) * getattr(torch, content["dtype"]).itemsize
        return StoredTensor(dtype, shape, size, stored.offset, stored.file)


class MergedSource:
    """`under`, each weight that the adapter changes in float32 with its delta added, once."""

    is_immutable = False

    def __init__(
        self, under: TensorSource, updates: Mapping[str, Callable[[], torch.Tensor]], identity: Mapping[str, str]
    ) -> None:
        self._under, self._updates = under, updates
        self.location, self.folder, self.tensors = under.location, under.folder, under.tensors
        self.identity: Mapping[str, str] = {**under.identity, **identity}

    def read(self, name: str) -> torch.Tensor:
        """The merged tensor; others as they are."""
        value = self._under.read(name)
        if name not in self._updates:
            return value
        delta_oi = self._updates[name]()
        if value.shape != delta_oi.shape:
            delta_oi = delta_oi.T
        return value.float().add(delta_oi)


@dataclass(frozen=True)
class MergeBase:
    """A base and what an adapter does to it: `changed` maps a module to the name of its weight in the base's files."""

    source: DequantizedSource
    original: TensorSource | None
    original_names: Mapping[str, str]
    changed: Mapping[str, str]
    blueprint: Blueprint
    config: QuantizeConfig
    adapter: AdapterFolder

    def delta(self, module: str) -> torch.Tensor:
        """The adapter's delta of a module, float32 [o, i]."""
        return self.adapter.factors(module).dense()

    def dequantized(self, module: str) -> torch.Tensor:
        """The base's weight of a module as its 4 bits give it, float32 [o, i]."""
        quantized = self.source.stored(self.changed[module])
        return dequantize_into(quantized, torch.empty(quantized.shape))

    def full_precision(self, module: str) -> torch.Tensor:
        """The weight before it was quantized, float32 [o, i]; only with an original."""
        assert self.original is not None
        value = self.original.read(self.original_names[module]).float()
        return value.T.contiguous() if _is_conv(self.blueprint, module) else value

    def merged(self, base: str, identity: Mapping[str, str]) -> MergedSource:
        """The checkpoint with the deltas in, over `dequantized` or `original`."""
        names = self.changed if base == "dequantized" else self.original_names
        under: TensorSource | None = self.source if base == "dequantized" else self.original
        assert under is not None
        updates = {names[module]: (lambda module=module: self.delta(module)) for module in self.changed}
        return MergedSource(under, updates, {**identity, "adapter": self.adapter.digest})


def open_merge_base(
    source: DequantizedSource, original: TensorSource | None, adapter: AdapterFolder, max_shard_bytes: int
) -> MergeBase:
    """Find every module of the adapter in the base, and in the original if there is one.

    Raises:
        ModelError: a module that the base does not store in 4 bits, or a shape that differs.
    """
    storage = source.settings
    first = next(name for name in source.tensors if source.is_stored_in_4_bits(name))
    config = QuantizeConfig(
        type=storage["bnb_4bit_quant_type"],
        blocksize=source.stored(first).blocksize,  # pyright: ignore[reportArgumentType]  # one of those allowed
        double_quant=storage["bnb_4bit_use_double_quant"],
        skip_modules=list(storage.get("llm_int8_skip_modules") or ["lm_head"]),
        max_shard_bytes=max_shard_bytes,
    )
    blueprint = draw_blueprint(source, config)
    names = {tensor.name.removesuffix(".weight"): tensor.source for tensor in blueprint.tensors}
    for module in adapter.modules:
        if module not in names or not source.is_stored_in_4_bits(names[module]):
            raise ModelError(
                f"{adapter.path} changes {module}, which the base does not store in 4 bits; use its own base"
            )
        if adapter.factors(module).shape != source.stored(names[module]).shape:
            raise ModelError(f"{adapter.path}: {module} has another shape than the base's; use its own base")
    changed = {module: names[module] for module in adapter.modules}
    others: dict[str, str] = {}
    if original is not None:
        drawn = draw_blueprint(original, config)
        others = {tensor.name.removesuffix(".weight"): tensor.source for tensor in drawn.tensors}
        others = {module: others[module] for module in changed}
    return MergeBase(source, original, others, changed, blueprint, config, adapter)


def _is_conv(blueprint: Blueprint, module: str) -> bool:
    return isinstance(blueprint.model.get_submodule(module), Conv1D)


def _is_part(name: str) -> bool:
    return any(part in name for part in _PARTS)


def _transposed_names(base: Path, stored: Mapping[str, StoredTensor]) -> set[str]:
    modules = [name for name, module in empty_model(base).named_modules() if isinstance(module, Conv1D)]
    return {name for name in stored for module in modules if f".{name}".endswith(f".{module}.weight")}


def _copy_side_files(base: Path, folder: Path) -> None:
    for path in base.iterdir():
        weights = path.suffix in (".safetensors", *PICKLE_SUFFIXES) or path.name.endswith(".index.json")
        if path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and not weights:
            shutil.copyfile(path, folder / path.name)
    config = read_model_config(base)
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
