"""What becomes of every tensor of a checkpoint, decided from its config and headers: no weight is read for it.

The model is built on torch's meta device, where it has names and shapes and no memory. Names are mapped by
transformers' own rules: prefixes that come and go, and keys that it renames when it loads and names back when it saves.
Knows nothing of how tensors are quantized or written.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn.modules.conv import _ConvNd
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError
from qlora_core.quantization.audit import StorageFormat, linear_modules
from qlora_core.quantization.auto_class import ENCODER_DECODER_TYPES, auto_class, is_supported
from qlora_core.quantization.checkpoint import checkpoint_dtype, read_model_config
from qlora_core.quantization.tensor_source import TensorSource


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the model: `source` is its name in the checkpoint, `name` the model's, `written` the new file's.

    `transposed`: the source is stored as [in_features, out_features], as GPT-2 does.
    """

    source: str
    name: str
    written: str
    quantized: bool
    transposed: bool


@dataclass(frozen=True)
class Blueprint:
    """`tensors` in the order in which the source holds them. `model` has no weights.

    `duplicates` are pairs of source names that the model ties: they must hold the same values. `parameters` counts tied
    ones once.
    """

    model: PreTrainedModel
    storage: StorageFormat
    tensors: tuple[PlannedTensor, ...]
    duplicates: tuple[tuple[str, str], ...]
    parameters: int


def draw_blueprint(source: TensorSource, config: QuantizeConfig) -> Blueprint:
    """Decide for every tensor of `source`. Output embeddings stay as they are, whatever `skip_modules` says.

    Raises:
        ModelError: transformers has no such architecture; a tensor of the model is missing, one of the checkpoint has
            no place or another shape; a weight is one that 4-bit storage has no form for.
    """
    model = _build_empty(source)
    storage = _storage_format(model, config)
    linears = dict(linear_modules(model, storage.skip_modules))
    _check_storable(source, model, linears)
    if not linears:
        raise ModelError(
            f"{source.location}: quantize.skip_modules {config.skip_modules} leaves no Linear to quantize; name fewer"
        )
    names = _SourceNames(source, model)
    found = names.found
    tensors = [
        PlannedTensor(
            source=found[name],
            name=name,
            written=names.written(name),
            quantized=(module := linears.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"),
            transposed=isinstance(module, Conv1D),
        )
        for name in found
    ]
    state = model.state_dict()
    for tensor in tensors:
        _check_shape(source, tensor, state[tensor.name])
    tensors.sort(key=lambda tensor: (source.tensors[tensor.source].file, source.tensors[tensor.source].offset))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Blueprint(model, storage, tuple(tensors), tuple(names.duplicates), parameters)


def check_architecture(source: TensorSource) -> None:
    """Refuse a checkpoint whose `model_type` is neither a causal language model nor T5; no custom code is run.

    Raises:
        ModelError: with the type and the version of transformers.
    """
    config = read_model_config(source.folder)
    model_type = config["model_type"]
    if not is_supported(model_type):
        custom = " It brings its own code (auto_map), which is never run." if "auto_map" in config else ""
        raise ModelError(
            f"{source.location}/config.json: model_type {model_type!r} is no causal language model of transformers "
            f"{transformers.__version__}.{custom} Name a base that is (llama, mistral, qwen2, gemma, ...) or "
            f"one of an encoder and a decoder ({', '.join(ENCODER_DECODER_TYPES)})"
        )


class _SourceNames:
    """Which tensor of the checkpoint is which of the model: `found`, model name to source name."""

    def __init__(self, source: TensorSource, model: PreTrainedModel) -> None:
        self._source = source
        self._model = model
        self._state: dict[str, Any] = model.state_dict()
        self.found: dict[str, str] = {}
        self.duplicates: list[tuple[str, str]] = []
        self._conversions = get_model_conversion_mapping(model)
        for name in source.tensors:
            self._place(name)
        self._resolve_ties()
        self._check_missing()
        used = [conversion for conversion in self._conversions if conversion.was_used()]
        self._back = [
            reverse
            for conversion in used[::-1]
            if isinstance(reverse := conversion.reverse_transform(), WeightRenaming)
        ]

    def written(self, name: str) -> str:
        """The name that `save_pretrained` gives a tensor of the model, so that loading finds the way back."""
        return apply_renamings(name, self._back)

    def _place(self, source_name: str) -> None:
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix
        name, converted = rename_source_key(source_name, renamings, converters, prefix, self._state)
        if name not in self._state and source_name in self._state:
            name, converted = rename_source_key(source_name, [], [], prefix, self._state)
        if converted is not None:
            raise ModelError(
                f"{self._source.location}: transformers merges or splits {source_name} when it loads it, which cannot "
                "be done tensor by tensor; load and save the model once with transformers' save_original_format=False, "
                "and name that folder"
            )
        if name not in self._state:
            self._check_ignorable(source_name, name)
        elif name in self.found:
            raise ModelError(
                f"{self._source.location}: {self.found[name]} and {source_name} are both the model's {name}; remove "
                "one of them from the checkpoint"
            )
        else:
            self.found[name] = source_name

    def _check_ignorable(self, source_name: str, name: str) -> None:
        """Buffers that the model computes for itself, and what transformers leaves out of this architecture, may go."""
        buffers = {buffer for buffer, _ in self._model.named_buffers()}
        patterns = [
            *(self._model._keys_to_ignore_on_load_unexpected or ()),
            r"rotary_emb\.inv_freq",
            r"(^|\.)position_ids$",
        ]
        if name in buffers or any(re.search(pattern, name) for pattern in patterns):
            return
        raise ModelError(
            f"{self._source.location}: tensor {source_name} has no place in a {type(self._model).__name__}; does "
            "config.json fit the weights? If the model does not need it, remove it from the checkpoint"
        )

    def _resolve_ties(self) -> None:
        for name, twin in self._model.all_tied_weights_keys.items():
            if name in self.found and twin in self.found:
                self.duplicates.append((self.found.pop(name), self.found[twin]))
            elif name in self.found:
                self.found[twin] = self.found.pop(name)

    def _check_missing(self) -> None:
        ignored = [
            *(self._model._keys_to_ignore_on_load_missing or ()),
            *map(re.escape, self._model.all_tied_weights_keys),
        ]
        lacking = sorted(
            name
            for name in self._state
            if name not in self.found and not any(re.search(pattern, name) for pattern in ignored)
        )
        if lacking:
            raise ModelError(
                f"{self._source.location} lacks {len(lacking)} weights that its config.json asks for: "
                f"{', '.join(lacking[:5])}; fetch the whole checkpoint again"
            )


def _build_empty(source: TensorSource) -> PreTrainedModel:
    check_architecture(source)
    dtype = getattr(torch, checkpoint_dtype(source.tensors))
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        with torch.device("meta"):
            model = auto_class(config.model_type).from_config(config, dtype=dtype)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError, OSError) as error:
        raise ModelError(
            f"{source.location}/config.json describes no model that transformers can build: {error}; fetch it again"
        ) from error
    return model.eval()


def _storage_format(model: PreTrainedModel, config: QuantizeConfig) -> StorageFormat:
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    # transformers leaves these modules out when it loads a 4-bit checkpoint, so they must not be stored so
    kept: Iterable[str] = [*heads, *sorted(model._keep_in_fp32_modules or ())]
    skip_modules = (*config.skip_modules, *(name for name in kept if name not in config.skip_modules))
    return StorageFormat(config.type, config.double_quant, skip_modules, config.blocksize)


def _check_storable(source: TensorSource, model: PreTrainedModel, linears: Mapping[str, torch.nn.Module]) -> None:
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(owner, recurse=False):
            if parameter.ndim == 3 and not isinstance(module, _ConvNd):
                raise ModelError(
                    f"{source.location}: {name} has shape {list(parameter.shape)}: fused experts (mixture of experts) "
                    "are no Linear that bitsandbytes stores in 4 bits; name a dense model"
                )
    for name, module in linears.items():
        if type(module) is not torch.nn.Linear and not isinstance(module, Conv1D):
            kind = type(module).__name__
            raise ModelError(f"{name} is a {kind}, which bitsandbytes cannot store; add it to quantize.skip_modules")


def _check_shape(source: TensorSource, tensor: PlannedTensor, wanted: torch.Tensor) -> None:
    shape = source.tensors[tensor.source].shape
    if shape != tuple(wanted.shape):
        raise ModelError(
            f"{source.location}: {tensor.source} has shape {list(shape)}, where config.json asks for "
            f"{list(wanted.shape)} ({math.prod(wanted.shape)} values); does config.json fit the weights?"
        )
