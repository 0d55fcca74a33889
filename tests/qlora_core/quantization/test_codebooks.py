"""The codebooks against literal values from the paper, the OCP specification and bitsandbytes."""

import math

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type
from scipy.stats import norm

from qlora_core.errors import ConfigError
from qlora_core.quantization.blockwise import dequantize_into, quantize_tensor
from qlora_core.quantization.codebooks import codebook, dynamic_map, normal_float_values

TYPES = ("nf4", "fp4", "e2m1", "int4")
# Dettmers et al. 2023, appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# bitsandbytes' CUDA kernel (csrc/kernels.cu, dQuantizeNF4 and dQuantizeFP4), rising
CUDA_NF4 = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip
CUDA_FP4 = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(values: torch.Tensor, type: str) -> np.ndarray:
    packed = quantize_tensor(values, type=type, blocksize=64, double_quant=False).codes.numpy().reshape(-1)
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: values.numel()]


def test_nf4_is_the_papers_and_bitsandbytes() -> None:
    assert codebook("nf4").values.tolist() == pytest.approx(NF4, abs=1e-6)
    assert np.array_equal(codebook("nf4").values, get_4bit_type("nf4", device="cpu").numpy())


def test_nf4_follows_from_its_construction_and_not_from_equation_4() -> None:
    assert normal_float_values() == pytest.approx(np.array(codebook("nf4").values, np.float64), abs=1.2e-7)
    # equation (4): means of neighbouring quantiles at i / 17; the outermost are infinite
    quantiles = norm.ppf(np.arange(18) / 17)
    assert not np.isfinite((quantiles[:-1] + quantiles[1:])[[0, -1]]).any()


def test_nf4_thresholds_are_the_cuda_kernels_to_the_bit() -> None:
    assert np.array_equal(codebook("nf4").thresholds, np.array(CUDA_NF4, np.float32))


def test_fp4_is_bitsandbytes_and_not_e2m1() -> None:
    assert np.array_equal(codebook("fp4").values, get_4bit_type("fp4", device="cpu").numpy())
    assert codebook("fp4").values[1] == pytest.approx(0.0052, abs=5e-5)
    assert codebook("e2m1").values[1] == pytest.approx(0.0833, abs=5e-5)


def test_e2m1_is_the_ocp_formats() -> None:
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP Microscaling Formats 1.0, table 5
    assert (codebook("e2m1").values * 6).tolist() == pytest.approx(positive + [-value for value in positive])


def test_int4_is_uniform_and_never_gives_its_lowest_code() -> None:
    book = codebook("int4")
    assert (book.values * 7).tolist() == pytest.approx([*range(8), *range(-8, 0)])
    assert 8 not in codes_of(normal(100_000), "int4")


def test_dynamic_map_is_bitsandbytes_to_the_bit() -> None:
    assert np.array_equal(dynamic_map(), create_dynamic_map().numpy())


@pytest.mark.parametrize("type", TYPES)
def test_every_value_keeps_its_code(type: str) -> None:
    book = codebook(type)
    codes = [code for code in range(16) if abs(book.values[code]) <= 1 and not (code == 8 and book.values[8] == 0)]
    values = torch.from_numpy(book.values[codes])
    assert codes_of(values, type).tolist() == codes
    restored = dequantize_into(
        quantize_tensor(values, type=type, blocksize=64, double_quant=False), torch.empty(len(codes))
    )
    assert torch.equal(restored, values)


@pytest.mark.parametrize("type", TYPES)
def test_ties_and_their_neighbours(type: str) -> None:
    """At a threshold the lower code, just above it the next; under the symmetric types as much the other way round."""
    book = codebook(type)
    limits = book.thresholds[np.isfinite(book.thresholds) & (np.abs(book.thresholds) > 1e-30)]
    above = np.nextafter(limits, np.float32(2))
    rank = np.argsort(book.order)
    values = torch.from_numpy(np.concatenate([np.ones(1, np.float32), limits, above]))
    places = [int(rank[code]) for code in codes_of(values, type)[1:]]
    expected = [int(np.flatnonzero(book.thresholds == limit)[0]) for limit in limits]
    assert places == expected + [place + 1 for place in expected]


@pytest.mark.parametrize("type", ["e2m1", "int4"])
def test_negated_weights_give_negated_values(type: str) -> None:
    """On a grid that hits every tie exactly: multiples of 1/84 over a block whose absmax is a power of two."""
    weights = torch.arange(-64, 65).repeat_interleave(2).bfloat16()
    both = [
        dequantize_into(quantize_tensor(sign * weights, type=type, blocksize=64, double_quant=False), torch.empty(258))
        for sign in (1, -1)
    ]
    assert torch.equal(both[0], -both[1])


@pytest.mark.parametrize(("type", "published"), [("nf4", 0.0920), ("e2m1", 0.1057), ("int4", 0.1076), ("fp4", 0.1220)])
def test_error_on_normal_weights_is_the_known_one(type: str, published: float) -> None:
    """Relative L2 on N(0,1) at blocksize 64, measured independently of this code."""
    weight = normal(1024, 1024)
    restored = dequantize_into(quantize_tensor(weight, type=type, blocksize=64, double_quant=False), weight.clone())
    error = restored.double() - weight.double()
    assert math.sqrt(error.square().sum() / weight.double().square().sum()) == pytest.approx(published, abs=5e-4)


def test_fp4_by_the_cuda_kernels_rule_differs_in_the_sign_of_zero_alone() -> None:
    """float32 weights: at most one value in a million is rounded otherwise, though codes of zero differ often."""
    weight = normal(1 << 20)
    blocks = weight.numpy().reshape(-1, 64)
    relative = blocks * (np.float32(1) / np.abs(blocks).max(axis=1, keepdims=True))
    magnitude = np.array([0, 1, 6, 7, 4, 5, 2, 3])[np.searchsorted(np.array(CUDA_FP4, np.float32), np.abs(relative))]
    by_cuda = (magnitude + 8 * (relative < 0)).reshape(-1)
    ours = codes_of(weight, "fp4")
    values = codebook("fp4").values
    assert np.mean(values[by_cuda] != values[ours]) <= 1e-6
    assert 1e-4 < np.mean(by_cuda != ours) < 1e-2


def test_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'fp8' is unknown; choose one of nf4, fp4, e2m1, int4"):
        codebook("fp8")
