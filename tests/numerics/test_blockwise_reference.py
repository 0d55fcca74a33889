"""Blockwise quantization against a plain loop in NumPy float64, written from the format's description alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, quantize_tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Signed magnitudes over their largest, by code, written out anew
TABLES = {
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4": [value / 192 * sign for sign in (1, -1) for value in (0, 1, 128, 192, 64, 96, 32, 48)],
    "e2m1": [value / 12 * sign for sign in (1, -1) for value in (0, 1, 2, 3, 4, 6, 8, 12)],
    "int4": [value / 7 for value in (0, 1, 2, 3, 4, 5, 6, 7, np.nan, -7, -6, -5, -4, -3, -2, -1)],
}  # fmt: skip


def unpacked(quantized: QuantizedTensor, elements: int) -> list[int]:
    nibbles: list[int] = []
    for byte in quantized.codes.reshape(-1).tolist():
        nibbles += [byte >> 4, byte & 15]
    return nibbles[:elements]


def check(weight: torch.Tensor, type: str, blocksize: int) -> None:
    """absmax exact; every code's value within rounding of the nearest; restored values exact to a rounding."""
    quantized = quantize_tensor(weight, type=type, blocksize=blocksize, double_quant=False)
    exact = weight.reshape(-1).double().numpy()
    codes, table = unpacked(quantized, len(exact)), np.array(TABLES[type], np.float64)
    restored = dequantize_into(quantized, torch.empty(weight.shape)).reshape(-1).double().numpy()
    assert len(quantized.codes) == (len(exact) + 1) // 2
    for place, start in enumerate(range(0, len(exact), blocksize)):
        block = exact[start : start + blocksize]
        absmax = float(quantized.absmax[place])
        # below this bound a short block is divided by the bound itself
        assert absmax == np.abs(block).max() or absmax == np.float32(1e-38) >= np.abs(block).max()
        scale = max(absmax, 1e-38)
        for offset, value in enumerate(block / scale):
            code = codes[start + offset]
            distances = np.abs(table - value)
            assert distances[code] <= np.nanmin(distances) + 1e-6
            expected = table[code] * absmax
            assert abs(restored[start + offset] - expected) <= 1.2e-7 * abs(expected) + 1.5e-45


@pytest.mark.parametrize("type", list(TABLES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "blocksize"), [((3, 43), 64), ((2, 320), 64), ((9, 77), 256), ((5, 1000), 4096)])
def test_normal_weights(type: str, dtype: torch.dtype, shape: tuple[int, int], blocksize: int) -> None:
    check((torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype), type, blocksize)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    dtype=st.sampled_from(DTYPES),
    type=st.sampled_from(list(TABLES)),
    blocksize=st.sampled_from([64, 128]),
)
def test_any_weights(values: list[float], dtype: torch.dtype, type: str, blocksize: int) -> None:
    largest = torch.finfo(dtype).max
    check(torch.tensor(values).clamp(-largest, largest).to(dtype), type, blocksize)


@pytest.mark.parametrize("blocks", [1, 255, 257, 1000])
def test_double_quantization(blocks: int) -> None:
    """Second level: constants less their mean, relative to the largest of 256, through codes at steps of 2/65535."""
    weight = torch.randn(blocks, 64, generator=torch.Generator().manual_seed(5))
    constants = weight.abs().amax(1).double().numpy()
    quantized = quantize_tensor(weight, type="nf4", blocksize=64, double_quant=True)
    assert quantized.offset is not None
    assert quantized.nested_absmax is not None
    assert quantized.offset == pytest.approx(constants.mean(), rel=1e-6)
    once = quantize_tensor(weight, type="nf4", blocksize=64, double_quant=False)
    assert torch.equal(once.codes, quantized.codes)
    values = dequantize_into(quantized, torch.empty_like(weight))
    scales = values.abs().amax(1).double().numpy()  # every block holds its largest magnitude, 1.0 or -1.0 times absmax
    for start in range(0, blocks, 256):
        centred = constants[start : start + 256] - quantized.offset
        largest = np.abs(centred).max()
        assert quantized.nested_absmax[start // 256] == pytest.approx(largest, abs=1e-6)
        # neighbours in the dynamic map lie at most 0.9/64 apart near 1, so that the nearest is within half of that
        assert np.abs(scales[start : start + 256] - constants[start : start + 256]).max() <= largest * 0.0071 + 1e-6
