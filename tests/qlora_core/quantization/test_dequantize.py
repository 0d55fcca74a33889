"""The stored values against a NumPy float64 reference written from the format's description."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from scipy.stats import norm

from qlora_core.quantization.dequantize import blocks_cross_rows, dequantize_exact

# Dettmers et al. 2023, appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_code_table_is_the_papers() -> None:
    assert get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(NF4, abs=1e-6)


def test_code_table_follows_from_normal_quantiles() -> None:
    offset = 1 - (1 / 64 + 1 / 60)  # 0.9677083, the construction behind the literals
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]])) / positive.max()
    assert values == pytest.approx(np.array(NF4), abs=2e-7)


def reference_values(codes: torch.Tensor, state: Any) -> np.ndarray:
    """code table[code] * absmax over blocks of the flattened weight, first code in the high nibble, in float64."""
    packed = codes.numpy().reshape(-1)
    unpacked = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: state.shape.numel()]
    absmax = state.absmax.numpy().astype(np.float64)
    if state.nested:
        inner, table = state.state2, state.state2.code.numpy().astype(np.float64)
        outer = np.repeat(inner.absmax.numpy().astype(np.float64), inner.blocksize)[: len(absmax)]
        absmax = table[state.absmax.numpy()] * outer + state.offset.item()
    scale = np.repeat(absmax, state.blocksize)[: len(unpacked)]
    return (state.code.numpy().astype(np.float64)[unpacked] * scale).reshape(state.shape)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 512, 4096])
@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (33, 160), (64, 172), (7, 31), (3, 4096), (48, 1000)])
def test_values_equal_the_reference(
    shape: tuple[int, int], blocksize: int, double_quant: bool, quant_type: str
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant)
    expected = reference_values(codes, state)
    found = dequantize_exact(codes, state, torch.float32).double().numpy()
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_16_bit_output_is_the_float32_value_rounded() -> None:
    weight = torch.randn((64, 96), generator=torch.Generator().manual_seed(1))
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert blocks_cross_rows(state)
    exact = dequantize_exact(codes, state, torch.float32)
    assert torch.equal(dequantize_exact(codes, state, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize(("double_quant", "published"), [(False, 0.09198), (True, 0.09200)])
def test_error_on_normal_weights_is_the_known_one(double_quant: bool, published: float) -> None:
    """Relative L2 of NF4 on N(0,1) at blocksize 64, measured independently of this code: .09198, with DQ .09200."""
    weight = torch.randn((1024, 1024), generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    error = dequantize_exact(codes, state, torch.float32).double() - weight.double()
    assert math.sqrt(error.square().sum() / weight.double().square().sum()) == pytest.approx(published, abs=5e-4)


def test_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1.0
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    assert torch.equal(dequantize_exact(codes, state, torch.float32), weight)
