from typing import Any

import pytest
import torch

from qlora_core.adapters.calibrated import MomentShelf, calibrated_nf4, input_moments
from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, quantize_tensor


def values(quantized: QuantizedTensor) -> torch.Tensor:
    return dequantize_into(quantized, torch.empty(quantized.shape))


def inputs(tokens: int, wide: int, seed: int = 1) -> torch.Tensor:
    """Correlated, of unlike sizes, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(wide, wide, generator=generator) * torch.logspace(0, 1, wide)
    return torch.randn(tokens, wide, generator=generator) @ mix


@pytest.mark.parametrize("shape", [(32, 64), (17, 96), (5, 33)])  # blocks in rows, across rows, an odd number of codes
def test_with_unrelated_inputs_of_one_size_it_is_rounding_to_nearest(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    moments = 3.0 * torch.eye(shape[1])
    made = calibrated_nf4(weight, moments, blocksize=64, double_quant=True, dampening=0.01)
    nearest = quantize_tensor(weight, type="nf4", blocksize=64, double_quant=True)
    # bitsandbytes rounds by the absmax itself, this by the absmax that is stored: a weight near a midpoint may differ
    assert (values(made) != values(nearest)).double().mean() < 0.01
    assert torch.equal(made.absmax, nearest.absmax)
    assert made.codes.shape == nearest.codes.shape


@pytest.mark.parametrize("shape", [(48, 64), (24, 160)])
def test_it_brings_outputs_nearer_than_rounding_to_nearest(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x = inputs(2000, shape[1])
    made = calibrated_nf4(weight, x.T @ x, blocksize=64, double_quant=True, dampening=0.01)
    nearest = quantize_tensor(weight, type="nf4", blocksize=64, double_quant=True)
    fresh = inputs(500, shape[1])
    errors = [(fresh @ (values(each) - weight).T).norm().item() for each in (made, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_zero_blocks_and_dead_inputs_give_numbers() -> None:
    weight = torch.zeros(4, 64)
    x = inputs(100, 64)
    x[:, 5] = 0
    made = calibrated_nf4(weight, x.T @ x, blocksize=64, double_quant=False, dampening=0.01)
    assert torch.equal(values(made), weight)


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_moments_are_those_of_the_inputs_and_memory_is_kept() -> None:
    torch.manual_seed(1)
    two: Any = Two()
    x = torch.randn(7, 3)

    def run() -> None:
        two(x[:3])
        two(x[3:])

    moments = input_moments(two, run, ["one", "two"])
    torch.testing.assert_close(moments["one"], x.T @ x)
    hidden = two.one(x)
    torch.testing.assert_close(moments["two"], hidden.T @ hidden)
    narrow = MomentShelf(two, run, {"one": 3, "two": 5}, limit_bytes=4 * 9)
    torch.testing.assert_close(narrow.take("one"), moments["one"])
    torch.testing.assert_close(narrow.take("two"), moments["two"])
    assert narrow.passes == 2
    wide = MomentShelf(two, run, {"one": 3, "two": 5}, limit_bytes=4 * 34)
    wide.take("one")
    wide.take("two")
    assert wide.passes == 1
