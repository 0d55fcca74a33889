"""4-bit layers on a GPU: every residency beside float64, beside bitsandbytes, and what memory each takes."""

import copy
import threading
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit

from qlora_core.model.residency.layers import set_residency
from qlora_core.model.residency.scratch import shared_scratch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
WAYS = ["dense", "scratch", "bitsandbytes"]
MIB = 1 << 20


def stock_layer(features_in: int, features_out: int, *, dtype: torch.dtype, seed: int = 0) -> Any:
    make: Any = Params4bit
    layer: Any = Linear4bit(features_in, features_out, bias=False, compute_dtype=dtype, quant_type="nf4")
    weight = torch.randn(features_out, features_in, generator=torch.Generator().manual_seed(seed)) / features_in**0.5
    layer.weight = make(weight, requires_grad=False, quant_type="nf4", module=layer).to("cuda")
    layer.weight.quant_state.dtype = dtype
    return layer


def in_residency(layer: Any, residency: Any, dtype: torch.dtype) -> Any:
    changed = copy.deepcopy(layer)
    set_residency(changed, residency, dtype)
    return changed


def dense_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    dense = in_residency(layer, "dense", dtype)
    dense.stored()
    return dense.dense_weight


def forward_backward(layer: Any, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), gradient


def random_pair(layer: Any, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, layer.in_features, generator=generator)
    return x.to("cuda", dtype), torch.randn(rows, layer.out_features, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("residency", WAYS)
@pytest.mark.parametrize("rows", [1, 16, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("features_in", [1024, 1056])
def test_products_are_those_of_float64(
    residency: str, rows: int, dtype: torch.dtype, tolerance: float, features_in: int
) -> None:
    """Largest error over the largest value; bf16 keeps 8 bits, and rounds the weight and the result. 1056: crossing."""
    stock = stock_layer(features_in, 768, dtype=dtype)
    exact = dense_weight(stock, torch.float32).double()
    x, upstream = random_pair(stock, rows, dtype)
    y, gradient = forward_backward(in_residency(stock, residency, dtype), x, upstream)
    for found, expected in ((y, x.double() @ exact.T), (gradient, upstream.double() @ exact)):
        assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_scratch_agree_to_the_bit(dtype: torch.dtype) -> None:
    """The same cuBLAS call on the same values. bitsandbytes has kernels of its own for few rows, so it may differ."""
    stock = stock_layer(1024, 768, dtype=dtype)
    x, upstream = random_pair(stock, 64, dtype)
    dense, scratch = (forward_backward(in_residency(stock, way, dtype), x, upstream) for way in ("dense", "scratch"))
    assert torch.equal(dense[0], scratch[0])
    assert torch.equal(dense[1], scratch[1])


def test_stored_values_are_those_of_bitsandbytes_to_the_bit() -> None:
    stock = stock_layer(1024, 768, dtype=torch.bfloat16)
    assert torch.equal(
        dense_weight(stock, torch.bfloat16), dequantize_4bit(stock.weight.data, stock.weight.quant_state)
    )


def test_scratch_takes_one_buffer_and_keeps_nothing_for_the_backward_pass() -> None:
    layers = [in_residency(stock_layer(2048, 2048, dtype=torch.bfloat16, seed=seed), "scratch", torch.bfloat16)
              for seed in range(8)]  # fmt: skip
    chain, weight_bytes = torch.nn.Sequential(*layers), 2048 * 2048 * 2
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    chain(x).sum().backward()  # takes cuBLAS's workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = chain(x)
    assert torch.cuda.memory_allocated() - before < MIB, "a weight was saved for the backward pass"
    y.sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < weight_bytes + MIB


def test_the_backward_thread_and_streams_do_not_mix_weights() -> None:
    stocks = [stock_layer(1024, 1024, dtype=torch.float32, seed=seed) for seed in range(4)]
    layers = [in_residency(stock, "scratch", torch.float32) for stock in stocks]
    x, upstream = random_pair(stocks[0], 32, torch.float32)
    expected = [forward_backward(in_residency(stock, "dense", torch.float32), x, upstream) for stock in stocks]
    wrong: list[int] = []

    def train(place: int) -> None:
        stream = torch.cuda.Stream() if place % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                found = forward_backward(layers[place], x, upstream)
                stream.synchronize()
                if not all(torch.equal(a, b) for a, b in zip(found, expected[place], strict=True)):
                    wrong.append(place)

    threads = [threading.Thread(target=train, args=(place,)) for place in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("residency", WAYS)
def test_a_layer_made_on_the_cpu_moves_to_the_gpu_and_back(residency: str) -> None:
    make: Any = Params4bit
    layer: Any = Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(3))
    layer.weight = make(weight, requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    set_residency(layer, residency, torch.float32)  # pyright: ignore[reportArgumentType]
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(4))
    on_cpu = layer(x)
    torch.testing.assert_close(layer.to("cuda")(x.cuda()).cpu(), on_cpu, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.to("cpu")(x), on_cpu)


def test_the_scratch_is_shared_by_models_of_one_process() -> None:
    layers = [in_residency(stock_layer(512, 512, dtype=torch.bfloat16), "scratch", torch.bfloat16) for _ in range(2)]
    assert layers[0].scratch is layers[1].scratch is shared_scratch()
