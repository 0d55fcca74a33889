"""Weights of a checkpoint one at a time: as the source has them, as they are stored, and how far the two are apart.

Knows files, layers and numbers; nothing of texts, activations or reports.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError
from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, from_stored_tensors
from qlora_core.quantization.blueprint import draw_blueprint
from qlora_core.quantization.checkpoint import read_tensors
from qlora_core.quantization.tensor_source import LocalSource

OUTLIER_FACTOR = 6.0
"""A block is an outlier block when its absmax is over so many times the root mean square of its other weights.

Scaled to such an absmax, a fifth or more of normal weights lie nearer to 0 than to any other NF4 value. Of blocks of 64
normal weights less than one in 100,000 is an outlier block.
"""
_WEIGHTS_AT_A_TIME = 1 << 22  # so that float64 copies stay small; a multiple of every blocksize


@dataclass
class WeightError:
    """What quantizing did to one weight or to several; sums, so that errors can be added.

    `zeroed` of `nonzero` weights (not 0 in the source) are stored as 0. `outlier_blocks` of `blocks`: see
    `OUTLIER_FACTOR`. `stored_bytes` counts codes and absmax of both levels, and no code table.
    """

    weights: int = 0
    squares: float = 0.0
    error_squares: float = 0.0
    max_error: float = 0.0
    blocks: int = 0
    outlier_blocks: int = 0
    nonzero: int = 0
    zeroed: int = 0
    stored_bytes: int = 0

    @property
    def relative_l2(self) -> float:
        """Norm of the error over the norm of the weights; 0 where all weights are 0."""
        return math.sqrt(self.error_squares / self.squares) if self.squares else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits per weight; 0 for no weight."""
        return 8 * self.stored_bytes / self.weights if self.weights else 0.0

    def __add__(self, other: "WeightError") -> "WeightError":
        summed = {name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        return WeightError(**{**summed, "max_error": max(self.max_error, other.max_error)})


class LayerWeights:
    """The weights of the layers that are quantized: in the source's files, in the 4-bit files, and in a loaded model.

    `names` are the layers' modules in the model's order. Each weight is read when it is asked for, and none is kept.
    """

    def __init__(self, model: PreTrainedModel, source: Path, quantized: Path, config: QuantizeConfig) -> None:
        """`model` is loaded from `source`. Raises ModelError where `quantized` lacks a weight."""
        self._source = LocalSource(source)
        self._quantized = quantized
        self._files = {name: quantized / tensor.file for name, tensor in read_tensors(quantized).items()}
        self._modules: dict[str, Any] = dict(model.named_modules())
        blueprint = draw_blueprint(self._source, config)
        self.parameters = blueprint.parameters
        self._planned = {one.name.removesuffix(".weight"): one for one in blueprint.tensors if one.quantized}
        self.names = [name for name in self._modules if name in self._planned]
        lacking = [one.written for one in self._planned.values() if one.written not in self._files]
        if lacking:
            raise ModelError(
                f"{quantized} has no tensor {lacking[0]} ({len(lacking)} such): it was made from another base or with "
                f"other settings than {source}; quantize this base again"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def source(self, name: str) -> torch.Tensor:
        """The layer's weight [out_features, in_features] as the source file has it."""
        planned = self._planned[name]
        weight = self._source.read(planned.source)
        return weight.T.contiguous() if planned.transposed else weight

    def stored(self, name: str) -> QuantizedTensor:
        """The layer's weight as the 4-bit file has it. Raises ModelError where its shape is not the source's."""
        own = self._planned[name].written
        parts = {key: self._read(key) for key in self._files if key == own or key.startswith(f"{own}.")}
        quantized = from_stored_tensors(own, parts)
        if tuple(quantized.shape) != tuple(self.loaded(name).shape):
            raise ModelError(
                f"{self._quantized}: {name} has shape {list(quantized.shape)}, in the source "
                f"{list(self.loaded(name).shape)}: it was made from another base; quantize this one"
            )
        return quantized

    def loaded(self, name: str) -> torch.Tensor:
        """The layer's weight [out_features, in_features] in the loaded model, as a view of its parameter."""
        weight = self._modules[name].weight.data
        return weight.T if self._planned[name].transposed else weight

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)


def restore(quantized: QuantizedTensor) -> torch.Tensor:
    """The values a stored weight stands for: float32, in the weight's shape, on the CPU."""
    return dequantize_into(quantized, torch.empty(quantized.shape, dtype=torch.float32))


def measure(weight: torch.Tensor, quantized: QuantizedTensor, restored: torch.Tensor) -> WeightError:
    """Compare `restored`, the values of `quantized`, with the source's `weight` of the same shape, in float64.

    Blocks are those of `quantized`: over the flattened row-major weight, the last one may be short.
    """
    total = WeightError()
    flat, restored = weight.reshape(-1), restored.reshape(-1)
    for start in range(0, flat.numel(), _WEIGHTS_AT_A_TIME):
        piece = slice(start, start + _WEIGHTS_AT_A_TIME)
        total += _measure_piece(flat[piece].double(), restored[piece].double(), quantized.blocksize)
    total.stored_bytes = _stored_bytes(quantized)
    return total


def _measure_piece(exact: torch.Tensor, restored: torch.Tensor, blocksize: int) -> WeightError:
    error = restored - exact
    outliers = _outlier_blocks(exact, blocksize)
    return WeightError(
        weights=exact.numel(),
        squares=exact.square().sum().item(),
        error_squares=error.square().sum().item(),
        max_error=error.abs().max().item(),
        blocks=outliers.numel(),
        outlier_blocks=int(outliers.sum()),
        nonzero=int((exact != 0).sum()),
        zeroed=int(((restored == 0) & (exact != 0)).sum()),
    )


def _outlier_blocks(exact: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Whether each block of a flat float64 weight is an outlier block; a block of one weight never is."""
    sizes = torch.full((-(-exact.numel() // blocksize),), float(blocksize), dtype=torch.float64)
    sizes[-1] -= sizes.numel() * blocksize - exact.numel()
    padded = torch.nn.functional.pad(exact, (0, sizes.numel() * blocksize - exact.numel()))
    squares = padded.reshape(-1, blocksize).square()
    # Without the largest itself: added and taken away again, it would swallow the others' digits.
    place = squares.argmax(dim=1, keepdim=True)
    largest = squares.gather(1, place).squeeze(1)
    others = squares.scatter(1, place, 0.0).sum(dim=1)
    return largest * (sizes - 1) > OUTLIER_FACTOR**2 * others


def _stored_bytes(quantized: QuantizedTensor) -> int:
    parts = (quantized.codes, quantized.absmax, quantized.nested_absmax)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
