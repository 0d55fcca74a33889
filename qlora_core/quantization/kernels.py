"""Compiled loops of blockwise 4-bit quantization on the CPU. Know arrays only: no tensor, no name of a datatype.

Blocks are taken over flat arrays; each kernel does the blocks `start` to `stop`, releases Python's lock, makes no copy
of what it reads and gives the same bytes however the blocks are shared out among threads. 16-bit floats, which numba
has no type for, come as their bits: bfloat16 as uint16, float16 as int16.

The inner loops are written in LLVM's vectors of 16 lanes, which it splits into what the processor has: its vectorizer
does not find them in loops over scalars. All is in one file because numba's cache of machine code knows of changes in
a kernel's own file alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qlora_core.compiled import compiled

LANES = 16  # values that are quantized at once; divides every blocksize
UNPACKED = 64  # values that are restored at once; divides every blocksize
NESTED_BLOCKSIZE = 256
LEAST_ABSMAX = np.float32(1e-38)  # whose reciprocal is finite


def _pack_multiplied(
    context: Any, source: Any, place: Any, scale: Any, thresholds: Any, packed: Any, byte: Any
) -> tuple[Any, Any]:
    """Ranks of `source[place : place + 16] * scale` into `packed[byte : byte + 8]`, the first of two in high nibbles.

    A rank is how many of the 15 rising thresholds the value exceeds, found by bisection: 4 comparisons, and selections
    of the next threshold. `thresholds` is a tuple of float32.
    """
    return types.void(source, types.intp, types.float32, thresholds, packed, types.intp), _pack("fmul")


def _pack_divided(
    context: Any, source: Any, place: Any, divisor: Any, thresholds: Any, packed: Any, byte: Any
) -> tuple[Any, Any]:
    """As `_pack_multiplied`, of `source[place : place + 16] / divisor`."""
    return types.void(source, types.intp, types.float32, thresholds, packed, types.intp), _pack("fdiv")


def _pack(operation: str) -> Callable[..., Any]:
    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, place, factor, bounds, packed, byte = arguments
        loaded = _load(target, builder, signature.args[0], source, place)
        values = getattr(builder, operation)(loaded, _splat(builder, factor))
        ranks = _bisect(builder, values, [_splat(builder, builder.extract_value(bounds, k)) for k in range(15)])
        half = _vector(32, LANES // 2)
        even, odd = (
            builder.shuffle_vector(ranks, ranks, ir.Constant(half, list(range(first, LANES, 2)))) for first in (0, 1)
        )
        both = builder.or_(builder.shl(even, _constant(half, 4)), odd)
        narrow = builder.trunc(both, _vector(8, LANES // 2))
        builder.store(narrow, _address(target, builder, signature.args[4], packed, byte, narrow.type), align=1)
        return target.get_dummy_value()

    return generate


def _scale_table(context: Any, table: Any, scale: Any, out: Any) -> tuple[Any, Callable[..., Any]]:
    """`table[:16] * scale` (float32) into `out[:16]`, rounded to the nearest value of its type, ties to even."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, scale, out = arguments
        start = ir.Constant(ir.IntType(64), 0)
        loaded = _load(target, builder, signature.args[0], table, start)
        _store(target, builder, signature.args[2], out, start, builder.fmul(loaded, _splat(builder, scale)))
        return target.get_dummy_value()

    return types.void(table, types.float32, out), generate


def _unpack(context: Any, codes: Any, byte: Any, table: Any, out: Any, place: Any) -> tuple[Any, Callable[..., Any]]:
    """Write what the 64 codes in `codes[byte : byte + 32]` stand for in `table[:16]` to `out[place : place + 64]`.

    Each is selected from the table by its code's four bits, in vectors of 64 bytes.
    """

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, byte, table, out, place = arguments
        lanes = 64 // (signature.args[3].dtype.bitwidth // 8)
        words = _vector(signature.args[3].dtype.bitwidth, lanes)
        entries = target.make_array(signature.args[2])(target, builder, table).data
        index = functools.partial(ir.Constant, ir.IntType(64))
        loaded = [_splat(builder, builder.load(builder.gep(entries, [index(k)])), lanes) for k in range(16)]
        shifts = ir.Constant(words, [4, 0] * (lanes // 2))
        twice = ir.Constant(_vector(32, lanes), [lane // 2 for lane in range(lanes)])
        for start in range(0, UNPACKED, lanes):
            first = builder.add(byte, index(start // 2))
            source = _address(target, builder, signature.args[0], codes, first, _vector(8, lanes // 2))
            raw = builder.load(source, align=1)
            nibbles = builder.lshr(builder.zext(builder.shuffle_vector(raw, raw, twice), words), shifts)
            values = loaded
            for bit in (1, 2, 4, 8):
                is_set = builder.icmp_unsigned("!=", builder.and_(nibbles, _constant(words, bit)), _constant(words, 0))
                values = [builder.select(is_set, values[k + 1], values[k]) for k in range(0, len(values), 2)]
            where = builder.add(place, index(start))
            aim = _address(target, builder, signature.args[3], out, where, values[0].type)
            builder.store(values[0], aim, align=words.element.width // 8)
        return target.get_dummy_value()

    return types.void(codes, types.intp, table, out, types.intp), generate


def _as_float(context: Any, bits: Any, source: Any) -> tuple[Any, Callable[..., Any]]:
    """The float32 that `bits` (numba makes them 64), without a sign, stand for in an array such as `source`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, single = ir.IntType(32), ir.FloatType()
        wide = builder.trunc(arguments[0], word)
        if source.dtype == types.float32:
            return builder.bitcast(wide, single)
        if source.dtype == types.uint16:
            return builder.bitcast(builder.shl(wide, ir.Constant(word, 16)), single)
        small = builder.bitcast(builder.shl(wide, ir.Constant(word, 13)), single)
        return builder.fmul(small, ir.Constant(single, 2.0**112))

    return types.float32(bits, source), generate


pack_multiplied: Any = intrinsic(_pack_multiplied)
pack_divided: Any = intrinsic(_pack_divided)
scale_table: Any = intrinsic(_scale_table)
unpack: Any = intrinsic(_unpack)
as_float: Any = intrinsic(_as_float)


def _load(target: Any, builder: Any, array_type: Any, array: Any, place: Any) -> Any:
    """float32 [LANES] of an array of float32, or of the bits of bfloat16 (uint16) or float16 (int16)."""
    floats, words = ir.VectorType(ir.FloatType(), LANES), _vector(32)
    if array_type.dtype == types.float32:
        return builder.load(_address(target, builder, array_type, array, place, floats), align=4)
    bits = builder.load(_address(target, builder, array_type, array, place, _vector(16)), align=2)
    wide = builder.zext(bits, words)
    if array_type.dtype == types.uint16:
        return builder.bitcast(builder.shl(wide, _constant(words, 16)), floats)
    sign = builder.shl(builder.and_(wide, _constant(words, 0x8000)), _constant(words, 16))
    size = builder.shl(builder.and_(wide, _constant(words, 0x7FFF)), _constant(words, 13))
    return builder.fmul(builder.bitcast(builder.or_(sign, size), floats), _constant(floats, 2.0**112))


def _store(target: Any, builder: Any, array_type: Any, array: Any, place: Any, values: Any) -> None:
    """The reverse of `_load`, rounded to the nearest value of the array's type, ties to even."""
    if array_type.dtype == types.float32:
        builder.store(values, _address(target, builder, array_type, array, place, values.type), align=4)
        return
    rounded = _bfloat16(builder, values) if array_type.dtype == types.uint16 else _float16(builder, values)
    bits = builder.trunc(rounded, _vector(16))
    builder.store(bits, _address(target, builder, array_type, array, place, bits.type), align=2)


def _bfloat16(builder: Any, values: Any) -> Any:
    """The bits of finite float32 values as bfloat16, in 32-bit lanes."""
    words = _vector(32)
    bits = builder.bitcast(values, words)
    even = builder.and_(builder.lshr(bits, _constant(words, 16)), _constant(words, 1))
    return builder.lshr(builder.add(builder.add(bits, _constant(words, 0x7FFF)), even), _constant(words, 16))


def _float16(builder: Any, values: Any) -> Any:
    """The bits of finite float32 values as float16, in 32-bit lanes; from 65520 on they are those of infinity."""
    words, constant = _vector(32), lambda value: _constant(_vector(32), value)
    bits = builder.bitcast(values, words)
    size = builder.and_(bits, constant(0x7FFFFFFF))
    even = builder.and_(builder.lshr(size, constant(13)), constant(1))
    rebias = constant(0xFFF - (112 << 23) & 0xFFFFFFFF)  # 127 - 15, the difference of the exponents' biases
    normal = builder.lshr(builder.add(builder.add(size, rebias), even), constant(13))
    # Added to one half, a value below 2^-14 is rounded to a multiple of 2^-24, float16's smallest step.
    shifted = builder.fadd(builder.bitcast(size, values.type), _constant(values.type, 0.5))
    small = builder.sub(builder.bitcast(shifted, words), constant(0x3F000000))
    rounded = builder.select(builder.icmp_unsigned("<", size, constant(0x38800000)), small, normal)
    rounded = builder.select(builder.icmp_unsigned("<", size, constant(0x477FF000)), rounded, constant(0x7C00))
    return builder.or_(rounded, builder.and_(builder.lshr(bits, constant(16)), constant(0x8000)))


def _vector(width: int, lanes: int = LANES) -> Any:
    return ir.VectorType(ir.IntType(width), lanes)


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _zero() -> Any:
    return _constant(_vector(32), 0)


def _address(target: Any, builder: Any, array_type: Any, array: Any, place: Any, vector: Any) -> Any:
    data = target.make_array(array_type)(target, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())


def _splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, empty, _constant(_vector(32, lanes), 0))


def _bisect(builder: Any, values: Any, limits: list[Any]) -> Any:
    """How many of the 15 `limits` each value exceeds, bit by bit from the highest."""
    words = _vector(32)
    found, weight = _zero(), 8
    while weight:
        exceeds = builder.fcmp_ordered(">", values, limits[len(limits) // 2])
        found = builder.or_(found, builder.select(exceeds, _constant(words, weight), _zero()))
        lower, upper = limits[: len(limits) // 2], limits[len(limits) // 2 + 1 :]
        limits = [builder.select(exceeds, above, below) for below, above in zip(lower, upper, strict=True)]
        weight //= 2
    return found


@compiled
def quantize_blocks(
    source: Any,
    bits: Any,
    magnitude: Any,
    thresholds: Any,
    bytes_of_ranks: Any,
    blocksize: int,
    start: int,
    stop: int,
    codes: Any,
    absmax: Any,
) -> Any:
    """Write absmax (float32) and packed codes of blocks; returns the bits of the largest magnitude met.

    `source` [n]: float32, or the bits of bfloat16 (uint16) or float16 (int16). `bits`: the same as unsigned integers,
    and `magnitude` of their type, all bits but the sign's. `thresholds`: a tuple of 15 float32. `bytes_of_ranks`: uint8
    [256], the byte of codes for a byte of two ranks; empty where ranks are codes. The last block may be short; of an
    odd n the last low nibble is the code of zero.
    """
    overall = bits[0] & magnitude
    for b in range(start, stop):
        values = bits[b * blocksize : (b + 1) * blocksize]
        most = values[0] & magnitude
        for i in range(len(values)):
            most = max(most, values[i] & magnitude)
        overall = max(overall, most)
        largest = as_float(np.uint64(most), source)
        floor = max(largest, LEAST_ABSMAX)
        scale = np.float32(1) / floor
        first, count = b * (blocksize // 2), (len(values) + 1) // 2
        if len(values) == blocksize:
            absmax[b] = largest
            for place in range(0, blocksize, LANES):
                pack_multiplied(source, b * blocksize + place, scale, thresholds, codes, first + place // 2)
        else:
            absmax[b] = floor  # as bitsandbytes' CPU operator, which also divides short blocks instead of multiplying
            pack_short(source[b * blocksize :], floor, thresholds, codes[first : first + count])
        if len(bytes_of_ranks):
            for j in range(first, first + count):
                codes[j] = bytes_of_ranks[codes[j]]
    return overall


@compiled
def pack_short(source: Any, divisor: Any, thresholds: Any, codes: Any) -> None:
    """Ranks of a block of any length, over `divisor`; what is lacking to whole bytes is taken as zero."""
    padded = np.zeros(-(-len(source) // LANES) * LANES, source.dtype)
    padded[: len(source)] = source
    packed = np.empty(len(padded) // 2, np.uint8)
    for place in range(0, len(padded), LANES):
        pack_divided(padded, place, divisor, thresholds, packed, place // 2)
    codes[:] = packed[: len(codes)]


@compiled
def quantize_absmax(centred: Any, nearest: Any, codes: Any, absmax: Any) -> None:
    """Second level: 8-bit codes of float32 constants less their mean, in blocks of 256, through a grid of codes.

    `nearest`: uint8 [65536], the codes at equal steps over [-1, 1]; a block of zeros gets code 0 and absmax 0.
    """
    for b in range(len(absmax)):
        values = centred[b * NESTED_BLOCKSIZE : (b + 1) * NESTED_BLOCKSIZE]
        most = np.float32(0)
        for value in values:
            most = max(most, abs(value))
        absmax[b] = most
        scale = np.float32(1) / max(most, LEAST_ABSMAX)
        for i in range(len(values)):
            value = values[i] * scale
            if most < LEAST_ABSMAX:
                value = values[i] / most if most > 0 else np.float32(-1)
            value = min(max(value, np.float32(-1)), np.float32(1))
            place = np.int64((value + np.float32(1)) * np.float32(32767.5) + np.float32(0.5))
            codes[b * NESTED_BLOCKSIZE + i] = nearest[place]


@compiled
def dequantize_blocks(codes: Any, scales: Any, table: Any, blocksize: int, start: int, stop: int, out: Any) -> None:
    """Values of blocks into `out` [n]: float32, or the bits of bfloat16 (uint16) or float16 (int16).

    `codes`: uint8 [ceil(n / 2)]. `scales`: float32 [blocks]. `table`: float32 [16], by code. A value is rounded once,
    from float32 to the nearest of `out`'s type, ties to even.
    """
    scaled = np.empty(16, out.dtype)
    packed, tail = np.zeros(blocksize // 2, np.uint8), np.empty(blocksize, out.dtype)
    for b in range(start, stop):
        scale_table(table, scales[b], scaled)
        first = b * (blocksize // 2)
        if (b + 1) * blocksize <= len(out):
            for place in range(0, blocksize, UNPACKED):
                unpack(codes, first + place // 2, scaled, out, b * blocksize + place)
        else:
            rest = out[b * blocksize :]
            packed[: len(codes) - first] = codes[first:]
            for place in range(0, len(rest), UNPACKED):
                unpack(packed, place // 2, scaled, tail, place)
            rest[:] = tail[: len(rest)]


@compiled
def dequantize_columns(
    codes: Any, scales: Any, table: Any, shift: int, width: int, start: int, stop: int, out: Any
) -> None:
    """As `dequantize_blocks`, of a weight [rows, width] the columns `start` to `stop` alone, `out` [rows * columns].

    All three are multiples of 64. Blocks are of 2^shift values: a division for every 64 would take half of the time.
    """
    scaled = np.empty(16, out.dtype)
    place = 0
    for row in range(len(out) // (stop - start)):
        for first in range(row * width + start, row * width + stop, UNPACKED):
            scale_table(table, scales[first >> shift], scaled)
            unpack(codes, first >> 1, scaled, out, place)
            place += UNPACKED


@compiled
def dequantize_absmax(codes: Any, absmax: Any, values: Any, offset: Any, out: Any) -> None:
    """Undo `quantize_absmax`: `values[code] * absmax + offset` into `out` (float32 [blocks]).

    In two loops, so that the product is rounded before the offset is added.
    """
    for b in range(len(absmax)):
        part = out[b * NESTED_BLOCKSIZE : (b + 1) * NESTED_BLOCKSIZE]
        for i in range(len(part)):
            part[i] = values[codes[b * NESTED_BLOCKSIZE + i]] * absmax[b]
    for i in range(len(out)):
        out[i] += offset
