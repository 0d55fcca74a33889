"""Four-bit blockwise quantization of one tensor and back, and its stored form. Knows tensors: no layer, file or config.

A tensor is cut into blocks over its flattened row-major values, so that blocks cross rows; the last may be short. Each
block is divided by its largest magnitude (absmax) and every value becomes the 4-bit code of a neighbouring value in a
codebook. Double quantization stores the absmax constants, less their mean, in 8 bits in blocks of 256.

On the CPU the work is done by `kernels.py`, whose results are bitsandbytes' CPU operator's; on CUDA by bitsandbytes.
"""

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_4bit

from qlora_core.errors import ConfigError, ModelError
from qlora_core.quantization import kernels
from qlora_core.quantization.codebooks import Codebook, codebook, dynamic_codes, dynamic_map

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_BITSANDBYTES_TYPES = ("nf4", "fp4")
_STATE_KEY = "quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_VALUES_PER_THREAD = 1 << 20  # for fewer, starting a thread costs more than it saves
_LOOKED_UP = 1 << 22  # codes at a time, so that index tensors stay small


@dataclass(frozen=True)
class QuantizedTensor:
    """Stored form of one tensor of n elements.

    `codes`: uint8 [ceil(n / 2), 1], the first code in the high nibble. `absmax`: float32 [blocks], or, under double
    quantization, uint8 [blocks] with `nested_absmax` float32 [ceil(blocks / 256)] and `offset`, the mean. `type`: see
    `codebook`. `shape` and `dtype` are the source's. An empty tensor has no codes and no blocks.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: float | None
    shape: tuple[int, ...]
    type: str
    blocksize: int
    dtype: torch.dtype


def quantize_tensor(
    weight: torch.Tensor, *, type: str, blocksize: int, double_quant: bool, threads: int | None = None
) -> QuantizedTensor:
    """Quantize `weight` (float32, float16 or bfloat16, any shape) where it lies.

    Makes no full-size copy of a contiguous tensor. The result does not depend on `threads` (None: as many as torch
    has). On CUDA the types that bitsandbytes lacks are quantized by the CPU.

    Raises:
        ModelError: NaN or infinity, with how many and the first place; another dtype or device.
        ConfigError: an unknown type, blocksize or number of threads.
    """
    book = codebook(type)
    _check_settings(blocksize, threads)
    if weight.dtype not in _DTYPES.values():
        raise ModelError(f"a tensor of {weight.dtype} cannot be quantized; convert it to one of {', '.join(_DTYPES)}")
    weight = weight.detach().contiguous()
    if weight.device.type == "cpu":
        return _quantize_on_cpu(weight, book, blocksize, double_quant, threads)
    if weight.device.type != "cuda":
        raise ModelError(f"tensors on {weight.device} cannot be quantized; move them to cpu or cuda")
    if type not in _BITSANDBYTES_TYPES:
        return _to_device(_quantize_on_cpu(weight.cpu(), book, blocksize, double_quant, threads), weight.device)
    if not torch.isfinite(weight).all():
        raise _not_finite(weight)
    codes, state = quantize_4bit(
        weight, blocksize=blocksize, quant_type=type, compress_statistics=double_quant and weight.numel() > 0
    )
    return from_bitsandbytes(codes, state)


def dequantize_into(quantized: QuantizedTensor, out: torch.Tensor, *, threads: int | None = None) -> torch.Tensor:
    """Write the values of `quantized` into `out` and return it.

    `out`: contiguous, float32, float16 or bfloat16, of as many elements in any shape, on the same device. A value is
    codebook[code] * absmax in float32, rounded once to `out`'s dtype. No temporary is larger than the absmax constants.

    Raises:
        ModelError: `out` does not fit, or the parts do not fit one another.
        ConfigError: fewer than one thread.
    """
    _check_settings(quantized.blocksize, threads)
    elements = math.prod(quantized.shape)
    _check_buffer(quantized, elements, out)
    if not elements:
        return out
    scales = absmax_constants(quantized)
    if out.device.type != "cpu":
        return _dequantize_on_gpu(quantized, scales, out)
    codes, table = quantized.codes.numpy().reshape(-1), codebook(quantized.type).values
    target, constants = _bits(out), scales.numpy()

    def run(start: int, stop: int) -> None:
        kernels.dequantize_blocks(codes, constants, table, quantized.blocksize, start, stop, target)

    _share_out(run, len(constants), elements, threads)
    return out


def from_bitsandbytes(codes: torch.Tensor, quant_state: Any) -> QuantizedTensor:
    """The same stored tensor, from bitsandbytes' codes (of any storage dtype) and QuantState; nothing is copied."""
    state = quant_state
    return QuantizedTensor(
        codes=codes.reshape(-1, 1).view(torch.uint8).reshape(-1, 1),
        absmax=state.absmax,
        nested_absmax=state.state2.absmax if state.nested else None,
        offset=float(state.offset) if state.nested else None,
        shape=tuple(state.shape),
        type=state.quant_type,
        blocksize=state.blocksize,
        dtype=state.dtype,
    )


def to_bitsandbytes_tensors(quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that transformers writes for a Linear4bit, by what follows the weight's name ("" for the codes).

    Equal to the byte. Types that bitsandbytes lacks are written alike; its QuantState refuses to read them.
    """
    device = quantized.codes.device
    nested = None
    if quantized.nested_absmax is not None:
        nested = QuantState(
            absmax=quantized.nested_absmax,
            blocksize=kernels.NESTED_BLOCKSIZE,
            code=torch.from_numpy(dynamic_map().copy()).to(device),
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=quantized.absmax,
        shape=torch.Size(quantized.shape),
        code=torch.from_numpy(codebook(quantized.type).values.copy()).to(device),
        blocksize=quantized.blocksize,
        quant_type=quantized.type,
        dtype=quantized.dtype,
        offset=None if quantized.offset is None else torch.tensor(quantized.offset),
        state2=nested,
    )
    return {"": quantized.codes, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


def from_stored_tensors(name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """The weight `name` of a checkpoint, whose `tensors` are given by their full names (others may be among them).

    Raises:
        ModelError: a part is missing or has the wrong size, or was made with another codebook than its type's.
    """
    prefix = f"{name}."
    parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    states = [key for key in parts if key.startswith(_STATE_KEY)]
    if name not in tensors or "absmax" not in parts or len(states) != 1:
        raise ModelError(
            f"{name} is not stored in 4 bits: codes, absmax or {_STATE_KEY}* are missing; quantize it again"
        )
    try:
        state = json.loads(bytes(parts[states[0]].cpu().tolist()))
        quantized = QuantizedTensor(
            codes=tensors[name].reshape(-1, 1).view(torch.uint8).reshape(-1, 1),
            absmax=parts["absmax"],
            nested_absmax=parts.get("nested_absmax"),
            offset=state.get("nested_offset"),
            shape=tuple(state["shape"]),
            type=state["quant_type"],
            blocksize=state["blocksize"],
            dtype=_DTYPES[state["dtype"]],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{name}: its packed quant_state cannot be read ({error!r}); quantize it again") from error
    _check_parts(name, quantized, parts)
    return quantized


def _check_settings(blocksize: int, threads: int | None) -> None:
    if blocksize not in BLOCKSIZES:
        raise ConfigError(f"blocksize {blocksize} is not possible; choose one of {', '.join(map(str, BLOCKSIZES))}")
    if threads is not None and threads < 1:
        raise ConfigError(f"{threads} threads cannot work; give 1 or more, or None for as many as torch has")


def _check_buffer(quantized: QuantizedTensor, elements: int, out: torch.Tensor) -> None:
    if out.numel() != elements or not out.is_contiguous() or out.dtype not in _DTYPES.values():
        raise ModelError(
            f"a buffer of {out.numel()} {out.dtype} values{'' if out.is_contiguous() else ' with gaps'} does not fit a "
            f"tensor of shape {list(quantized.shape)}; give a contiguous one of {elements} {', '.join(_DTYPES)} values"
        )
    if out.device != quantized.codes.device:
        raise ModelError(f"codes on {quantized.codes.device} and a buffer on {out.device}; bring them together first")
    _check_sizes("the tensor", quantized)


def _check_sizes(name: str, quantized: QuantizedTensor) -> None:
    """The kernels read as much as the shape says, whatever is there."""
    elements = math.prod(quantized.shape)
    blocks = -(-elements // quantized.blocksize)
    sizes = {"codes": (quantized.codes, -(-elements // 2)), "absmax": (quantized.absmax, blocks)}
    if quantized.absmax.dtype == torch.uint8 and blocks:
        if quantized.nested_absmax is None or quantized.offset is None:
            raise ModelError(f"{name}: its absmax is stored in 8 bits without nested_absmax; quantize it again")
        sizes["nested_absmax"] = (quantized.nested_absmax, -(-blocks // kernels.NESTED_BLOCKSIZE))
    for part, (tensor, size) in sizes.items():
        if tensor.numel() != size:
            raise ModelError(
                f"{name}: {part} has {tensor.numel()} elements, shape {list(quantized.shape)} at blocksize "
                f"{quantized.blocksize} needs {size}; quantize it again"
            )


def _check_parts(name: str, quantized: QuantizedTensor, parts: Mapping[str, torch.Tensor]) -> None:
    _check_sizes(name, quantized)
    maps = {"quant_map": codebook(quantized.type).values}
    if quantized.nested_absmax is not None:
        maps["nested_quant_map"] = dynamic_map()
    for part, values in maps.items():
        if part not in parts or not np.allclose(parts[part].cpu().numpy(), values, rtol=0, atol=1e-6):
            raise ModelError(f"{name}: {part} is not the codebook of {quantized.type}; quantize it again")


def _quantize_on_cpu(
    weight: torch.Tensor, book: Codebook, blocksize: int, double_quant: bool, threads: int | None
) -> QuantizedTensor:
    elements = weight.numel()
    blocks = -(-elements // blocksize)
    codes, absmax = np.empty(-(-elements // 2), np.uint8), np.empty(blocks, np.float32)
    source = _bits(weight)
    bits = source.view(np.uint32 if source.itemsize == 4 else np.uint16)
    magnitude = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    thresholds, bytes_of_ranks = tuple(book.thresholds), _bytes_of_ranks(book)

    def run(start: int, stop: int) -> int:
        return kernels.quantize_blocks(
            source, bits, magnitude, thresholds, bytes_of_ranks, blocksize, start, stop, codes, absmax
        )

    largest = max(_share_out(run, blocks, elements, threads), default=0)
    if largest > int(_bits(torch.tensor(torch.finfo(weight.dtype).max, dtype=weight.dtype)).view(bits.dtype)[0]):
        raise _not_finite(weight)
    quantized = QuantizedTensor(
        codes=torch.from_numpy(codes).reshape(-1, 1),
        absmax=torch.from_numpy(absmax),
        nested_absmax=None,
        offset=None,
        shape=tuple(weight.shape),
        type=book.type,
        blocksize=blocksize,
        dtype=weight.dtype,
    )
    return _quantize_absmax(quantized) if double_quant and blocks else quantized


def _quantize_absmax(quantized: QuantizedTensor) -> QuantizedTensor:
    # torch adds up one long row in as many parts as it has threads, but each of two rows in one
    offset = torch.stack((quantized.absmax, quantized.absmax)).mean(dim=1)[0]
    codes = np.empty(len(quantized.absmax), np.uint8)
    nested = np.empty(-(-len(codes) // kernels.NESTED_BLOCKSIZE), np.float32)
    kernels.quantize_absmax((quantized.absmax - offset).numpy(), dynamic_codes(), codes, nested)
    return replace(
        quantized, absmax=torch.from_numpy(codes), nested_absmax=torch.from_numpy(nested), offset=offset.item()
    )


def _bytes_of_ranks(book: Codebook) -> np.ndarray:
    """uint8 [256]: the byte of codes for a byte of two ranks; empty where they are the same."""
    if np.array_equal(book.order, np.arange(16)):
        return np.empty(0, np.uint8)
    return ((book.order[:, None] << 4) | book.order[None, :]).reshape(-1)


def absmax_constants(quantized: QuantizedTensor) -> torch.Tensor:
    """float32 [blocks]: the absmax of every block, double quantization undone.

    Raises:
        ModelError: the parts do not fit one another.
    """
    _check_sizes("the tensor", quantized)
    if quantized.nested_absmax is None or quantized.offset is None:
        return quantized.absmax.float()
    if quantized.absmax.device.type != "cpu":
        values = torch.from_numpy(dynamic_map()).to(quantized.absmax.device)
        state = QuantState(
            absmax=quantized.nested_absmax, blocksize=kernels.NESTED_BLOCKSIZE, code=values, dtype=torch.float32
        )
        return dequantize_blockwise(quantized.absmax, state) + quantized.offset
    scales = np.empty(len(quantized.absmax), np.float32)
    nested = quantized.nested_absmax.numpy()
    kernels.dequantize_absmax(quantized.absmax.numpy(), nested, dynamic_map(), np.float32(quantized.offset), scales)
    return torch.from_numpy(scales)


def _dequantize_on_gpu(quantized: QuantizedTensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if quantized.type not in _BITSANDBYTES_TYPES:
        return look_up(quantized, scales, out)
    torch.ops.bitsandbytes.dequantize_4bit.out(
        quantized.codes,
        scales,
        quantized.blocksize,
        quantized.type,
        quantized.shape,
        out.dtype,
        out=out.view(quantized.shape),
    )
    return out


def look_up(quantized: QuantizedTensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`dequantize_into` in torch's own operators, for types and devices without a kernel; `scales` float32 [blocks]."""
    table = torch.from_numpy(codebook(quantized.type).values.copy()).to(out.device)
    flat, packed = out.view(-1), quantized.codes.view(-1)
    for start in range(0, len(flat), _LOOKED_UP):  # a multiple of every blocksize
        part = flat[start : start + _LOOKED_UP]
        codes = packed[start // 2 : (start + len(part) + 1) // 2]
        places = torch.stack((codes >> 4, codes & 15), dim=1).view(-1)[: len(part)].int()
        blocks = scales[start // quantized.blocksize :][: -(-len(part) // quantized.blocksize)]
        part.copy_(table[places] * blocks.repeat_interleave(quantized.blocksize)[: len(part)])
    return out


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The flat values as `kernels` takes them, in the same memory: float32, uint16 (bfloat16) or int16 (float16)."""
    flat = tensor.reshape(-1)
    if tensor.dtype == torch.float32:
        return flat.numpy()
    bits = flat.view(torch.int16).numpy()
    return bits if tensor.dtype == torch.float16 else bits.view(np.uint16)


def _share_out(run: Callable[[int, int], Any], blocks: int, elements: int, threads: int | None) -> list[Any]:
    """What `run(start, stop)` gives for the blocks in one or several equal parts, one thread each."""
    count = min(threads or torch.get_num_threads(), max(elements // _VALUES_PER_THREAD, 1), blocks)
    bounds = [blocks * part // max(count, 1) for part in range(count + 1)]
    if count <= 1:
        return [run(0, blocks)] if blocks else []
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, bounds[:-1], bounds[1:]))


def _to_device(quantized: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    nested = quantized.nested_absmax
    return replace(
        quantized,
        codes=quantized.codes.to(device),
        absmax=quantized.absmax.to(device),
        nested_absmax=None if nested is None else nested.to(device),
    )


def _not_finite(weight: torch.Tensor) -> ModelError:
    wrong = (~torch.isfinite(weight)).reshape(-1).nonzero()
    place = np.unravel_index(int(wrong[0]), tuple(weight.shape)) if weight.ndim else ()
    return ModelError(
        f"{len(wrong)} of {weight.numel()} weights are NaN or infinite, the first at {[int(k) for k in place]}; each "
        "would spoil its whole block: repair the checkpoint"
    )
