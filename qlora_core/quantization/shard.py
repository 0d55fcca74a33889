"""One shard of a 4-bit checkpoint: its tensors read, quantized, measured, written and read back, one after the other.

Knows the source's tensors and the new file, not which shards there are or what becomes of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError
from qlora_core.quantization.blockwise import (
    QuantizedTensor,
    dequantize_into,
    quantize_tensor,
    to_bitsandbytes_tensors,
)
from qlora_core.quantization.blueprint import PlannedTensor
from qlora_core.quantization.error_sums import error_sums
from qlora_core.quantization.resume import ShardRecord
from qlora_core.quantization.safetensors_file import StreamedFile, digest_tensor, read_back
from qlora_core.quantization.tensor_source import TensorSource

Quantizer = Callable[[PlannedTensor, torch.Tensor], QuantizedTensor]
"""What makes the stored form of a weight [out_features, in_features]; by default rounding to nearest."""

PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATE_BYTES = 512  # of the packed quant_state, at most
_NESTED_BLOCKSIZE = 256
_AT_A_TIME = 1 << 16  # weights looked at at once: copies of them stay in the processor's cache
_FLOAT32_STEP = 2.0**-23
_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


@dataclass
class Shard:
    """The tensors that one file is to hold, and how many bytes they take there at most."""

    tensors: list[PlannedTensor] = field(default_factory=list)
    size_bytes: int = 0


def plan_shards(source: TensorSource, tensors: Sequence[PlannedTensor], config: QuantizeConfig) -> list[Shard]:
    """Tensors in their order, each with its parts in one file, files of at most `max_shard_bytes`.

    A tensor that is larger than that alone has a file of its own.
    """
    shards = [Shard()]
    for tensor in tensors:
        stored = source.tensors[tensor.source]
        size = _stored_bytes(math.prod(stored.shape), config) if tensor.quantized else stored.size_bytes
        if shards[-1].tensors and shards[-1].size_bytes + size > config.max_shard_bytes:
            shards.append(Shard())
        shards[-1].tensors.append(tensor)
        shards[-1].size_bytes += size
    return shards


def digest_source(source: TensorSource, shard: Shard) -> str:
    """Digest of what the shard is made from. Where names prove content it costs nothing, else one pass over it."""
    return _combined([_content(source, tensor.source, None) for tensor in shard.tensors])


def write_shard(
    source: TensorSource,
    shard: Shard,
    config: QuantizeConfig,
    path: Path,
    advance: Callable[[float], None],
    quantizer: Quantizer | None = None,
) -> ShardRecord:
    """Make the file of `shard` at `path`, whole and verified or not at all; `advance` is told of each tensor.

    `quantizer` replaces rounding to nearest; what it gives must be of the config's type, blocksize and nesting.

    Raises:
        ModelError: a tensor holds NaN or infinity, or the file reads back otherwise than it was meant.
        OSError: the disk refuses.
    """
    partial = path.with_suffix(".part")
    writer = _ShardWriter(source, config, quantizer)
    names = [f"{tensor.written}{part}" for tensor in shard.tensors for part in _part_names(tensor, config)]
    with StreamedFile(partial, names) as file:
        for tensor in shard.tensors:
            writer.add(file, tensor)
            advance(1)
        file.finish()
    digest = read_back(partial, writer.meant)
    partial.replace(path)
    return ShardRecord(path.name, digest, _combined(writer.source_digests), writer.layers)


class _ShardWriter:
    def __init__(self, source: TensorSource, config: QuantizeConfig, quantizer: Quantizer | None) -> None:
        self._source = source
        self._config = config
        self._quantizer = quantizer
        self._scratch = torch.empty(0)
        self.meant: dict[str, str] = {}
        self.source_digests: list[str] = []
        self.layers: list[dict[str, Any]] = []

    def add(self, file: StreamedFile, tensor: PlannedTensor) -> None:
        value = self._source.read(tensor.source)
        self.source_digests.append(_content(self._source, tensor.source, value))
        if not tensor.quantized:
            check_finite(value, self._source, tensor.source)
            self._write(file, tensor.written, value)
            return
        weight = value.T.contiguous() if tensor.transposed else value
        quantized = self._quantize(weight, value, tensor)
        for part, content in to_bitsandbytes_tensors(quantized).items():
            self._write(file, f"{tensor.written}{part}", content)
        errors = self._measure(weight, quantized)
        self.layers.append({"name": tensor.name.removesuffix(".weight"), "shape": list(weight.shape), **errors})

    def _write(self, file: StreamedFile, name: str, content: torch.Tensor) -> None:
        self.meant[name] = digest_tensor(content)
        file.add(name, content)

    def _quantize(self, weight: torch.Tensor, value: torch.Tensor, tensor: PlannedTensor) -> QuantizedTensor:
        config = self._config
        try:
            if self._quantizer is not None:
                return self._quantizer(tensor, weight)
            return quantize_tensor(
                weight, type=config.type, blocksize=config.blocksize, double_quant=config.double_quant
            )
        except ModelError:
            check_finite(value, self._source, tensor.source)  # says where, in the checkpoint's own words
            raise

    def _measure(self, weight: torch.Tensor, quantized: QuantizedTensor) -> dict[str, float]:
        """Error of the stored weight against the source in float64: ratio, maximum, and the squares for the model."""
        if self._scratch.numel() < weight.numel():
            self._scratch = torch.empty(weight.numel())
        restored = self._scratch[: weight.numel()]
        dequantize_into(quantized, restored.view(weight.shape))
        flat = weight.reshape(-1)
        squares = error_squares = largest = 0.0
        for start in range(0, flat.numel(), _AT_A_TIME):
            exact, stored = flat[start : start + _AT_A_TIME].float(), restored[start : start + _AT_A_TIME]
            part, error_part = error_sums(exact.numpy(), stored.numpy())
            squares, error_squares = squares + part, error_squares + error_part
            largest = max(largest, _largest_error(exact, stored, largest))
        ratio = math.sqrt(error_squares / squares) if squares else 0.0
        return {"relative_l2": ratio, "max_error": largest, "squares": squares, "error_squares": error_squares}


def _largest_error(exact: torch.Tensor, stored: torch.Tensor, known: float) -> float:
    """The largest absolute difference of two float32 tensors, in float64; 0 where it is not over `known`."""
    rounded = stored.sub(exact).abs_()
    largest = rounded.max()
    if largest.item() * (1 + _FLOAT32_STEP) < known:
        return 0.0
    places = rounded == largest  # rounding keeps order, so the true largest is among those that round to the largest
    return stored[places].double().sub_(exact[places]).abs_().max().item()


def check_finite(value: torch.Tensor, source: TensorSource, name: str) -> None:
    """Refuse a floating-point tensor with NaN or infinity; others pass.

    Raises:
        ModelError: with the tensor's name in the checkpoint, and the first place.
    """
    kind = _EXPONENT.get(value.dtype)
    if kind is None:
        return
    integers, exponent = kind
    flat = value.reshape(-1)
    for start in range(0, flat.numel(), _AT_A_TIME):
        exponents = flat[start : start + _AT_A_TIME].view(integers) & exponent
        if exponents.amax() == exponent:
            index = start + int(exponents.argmax())
            place = [int(part) for part in torch.unravel_index(torch.tensor(index), value.shape)]
            reason = "; float16 ends at 65504, what is larger overflows" if value.dtype == torch.float16 else ""
            raise ModelError(
                f"{source.location}: {name} holds NaN or infinity, the first at {place} ({flat[index].item()}), which "
                f"would spoil its blocks{reason}; repair the checkpoint, or fetch it again"
            )


def _content(source: TensorSource, name: str, value: torch.Tensor | None) -> str:
    """What changes when a tensor of the source does; `value` is the tensor, if it has been read already."""
    if source.is_immutable:
        return f"{source.identity[source.tensors[name].file]} {name}"
    return digest_tensor(source.read(name) if value is None else value)


def _part_names(tensor: PlannedTensor, config: QuantizeConfig) -> tuple[str, ...]:
    return (*PARTS, f".quant_state.bitsandbytes__{config.type}") if tensor.quantized else ("",)


def _stored_bytes(weights: int, config: QuantizeConfig) -> int:
    """Most bytes that a quantized weight takes: codes, absmax of both levels, code tables, packed state."""
    blocks = -(-weights // config.blocksize)
    nested = 4 * -(-blocks // _NESTED_BLOCKSIZE) + 4 * 256 if config.double_quant else 0
    return -(-weights // 2) + (1 if config.double_quant else 4) * blocks + nested + 4 * 16 + _STATE_BYTES


def _combined(digests: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(digests).encode())
