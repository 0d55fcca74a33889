"""The 4-bit and 8-bit codebooks: which value each code stands for, and between which thresholds a value gets it.

Knows numbers alone: no tensor, no block. All values are relative to a block's absmax, so they lie in [-1, 1].

Thresholds are the midpoints of neighbouring values in float32. Under `nf4` and `fp4` a tie goes to the lower value, as
in bitsandbytes' CPU operator; its CUDA kernel has the same thresholds and ties for `nf4`. Under `e2m1` and `int4`,
which bitsandbytes lacks, a tie goes towards zero, so that negated weights give negated values.
"""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from qlora_core.errors import ConfigError

# Dettmers et al. 2023, appendix E; equal to bitsandbytes' table.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Codebook:
    """A 4-bit datatype.

    `values`: float32 [16], by code. `order`: uint8 [16], the codes by rising value. `thresholds`: float32 [15], rising;
    a value that exceeds k of them gets code `order[k]`.
    """

    type: str
    values: np.ndarray
    order: np.ndarray
    thresholds: np.ndarray


@cache
def codebook(type: str) -> Codebook:
    """The codebook of a type: `nf4`, `fp4` (bitsandbytes' own), `e2m1` (OCP's FP4) or `int4`.

    Raises:
        ConfigError: another name.
    """
    if type not in _BUILDERS:
        raise ConfigError(f"4-bit type {type!r} is unknown; choose one of {', '.join(_BUILDERS)}")
    values, order, thresholds = _BUILDERS[type]()
    return Codebook(
        type, np.array(values, np.float32), np.array(order, np.uint8), np.array(thresholds, np.float32)
    )  # fmt: skip


def normal_float_values(outermost: float = 0.9677083) -> np.ndarray:
    """float64 [16]: the construction behind NF4's literals, from which it differs by at most 1.1e-7.

    Quantiles of the standard normal distribution at 8 positive and 7 negative probabilities, equally spaced from
    `outermost` to one half (left out), and zero, all over the largest. Equation (4) of the paper cannot be meant: its
    outermost quantiles are infinite. `outermost` is 1 - (1/64 + 1/60), rounded as in what made the literals.
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    return np.sort(np.array([*positive, *negative, 0.0])) / max(positive)


@cache
def dynamic_map() -> np.ndarray:
    """float32 [256], rising: the signed 8-bit dynamic datatype (Dettmers 2015) that holds absmax constants.

    A code has up to 6 leading zeros, which are its decimal exponent, and a linear fraction in the bits that remain: of
    exponent -e, 2^(6-e) means of neighbours on [0.1, 1]; then zero, and 1.0. There is no -1.0: the lowest is -0.993.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(steps))
        place = np.arange(steps + 1)
        # counted from the nearer end, as torch.linspace does: other orders are off in the last bit
        bounds = np.where(place < (steps + 1) // 2, np.float32(0.1) + step * place, 1 - step * (steps - place))
        means = (bounds.astype(np.float32)[:-1] + bounds.astype(np.float32)[1:]) / np.float32(2)
        means *= np.float32(10.0 ** (exponent - 6))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


@cache
def dynamic_codes() -> np.ndarray:
    """uint8 [65536]: codes of `dynamic_map` on a uniform grid over [-1, 1]; entry i is that nearest to i / 32767.5 - 1.

    bitsandbytes' CPU operator quantizes through such a grid. Its step, 3e-5, is wider than the six steps of the map
    around zero, so 7 codes are never used; an absmax that lies so near the mean differs by less than 1e-5 of the range.
    """
    grid = np.arange(65536, dtype=np.float32) / np.float32(32767.5) - np.float32(1)
    midpoints = (dynamic_map()[:-1] + dynamic_map()[1:]) / np.float32(2)
    return np.searchsorted(midpoints, grid).astype(np.uint8)


def _nf4() -> tuple[Any, Any, Any]:
    return NF4_VALUES, range(16), _midpoints(NF4_VALUES)


def _fp4() -> tuple[Any, Any, Any]:
    # Three bits after the sign, not in order of value; code 1 would be 1 by the rule of the others. Code 8, negative
    # zero, is what bitsandbytes' CPU operator gives to small positive values; its CUDA kernel gives it to negative ones
    # and has its thresholds 1 to 15 units in the last place beside the midpoints.
    magnitudes = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12)
    values = np.concatenate([magnitudes, 0 - magnitudes])
    order = np.argsort(values, stable=True)
    return values, order, _midpoints(values[order])


def _e2m1() -> tuple[Any, Any, Any]:
    # Exponent bias 1, subnormals below 1: (1 + m/2) 2^(e-1), and m/2 where e is 0 (OCP MX specification 1.0, 5.3.3).
    magnitudes = np.array([m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1) for e in range(4) for m in range(2)]) / 6
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    order = [*range(15, 7, -1), *range(8)]
    return np.concatenate([magnitudes, 0 - magnitudes]), order, _mirrored(midpoints)


def _int4() -> tuple[Any, Any, Any]:
    # Two's complement over 7. Code 8, -8/7, is never given, so that the range is symmetric.
    signed = [code - 16 if code > 7 else code for code in range(16)]
    midpoints = [(level + 0.5) / 7 for level in range(7)]
    positive_and_negative = np.delete(_mirrored(midpoints), 7)  # there is no negative zero
    return np.array(signed) / 7, np.argsort(signed), np.concatenate([[-np.inf], positive_and_negative])


def _midpoints(values: Any) -> np.ndarray:
    rising = np.array(values, np.float32)
    return (rising[:-1] + rising[1:]) / np.float32(2)


def _mirrored(thresholds: Any) -> np.ndarray:
    """15 thresholds from 7 positive ones: ties go towards zero on both sides, and -0.0 counts as zero."""
    positive = np.array(thresholds, np.float32)
    # x exceeds the float32 just below -t exactly if x >= -t
    negative = np.nextafter(-positive[::-1], np.float32(-np.inf))
    return np.concatenate([negative, [np.nextafter(np.float32(0), np.float32(-1))], positive]).astype(np.float32)


_BUILDERS = {"nf4": _nf4, "fp4": _fp4, "e2m1": _e2m1, "int4": _int4}
