"""Quantizing and restoring tensors beside bitsandbytes' CPU operators, and the stored form beside transformers'."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.errors import ConfigError, ModelError
from qlora_core.quantization.blockwise import (
    QuantizedTensor,
    dequantize_into,
    from_bitsandbytes,
    from_stored_tensors,
    look_up,
    quantize_tensor,
    to_bitsandbytes_tensors,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TYPES = ["nf4", "fp4", "e2m1", "int4"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def quantize(
    weight: torch.Tensor, type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> QuantizedTensor:
    return quantize_tensor(weight, type=type, blocksize=blocksize, double_quant=double_quant)


def restore(quantized: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dequantize_into(quantized, torch.full(quantized.shape, 7.0, dtype=dtype))


def bitsandbytes_values(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """By bitsandbytes' operator over one row of each block, which it computes rightly on every processor."""
    scales = state.absmax
    if state.nested:
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            scales, state.state2.absmax, state.state2.code, 256, torch.float32
        )
        scales = scales + state.offset
    elements, flat = state.shape.numel(), codes.reshape(-1)
    whole = elements // state.blocksize
    parts = []
    for start, stop, shape in ((0, whole, (whole, state.blocksize)), (whole, None, (1, elements % state.blocksize))):
        if 0 not in shape:
            piece = flat[start * state.blocksize // 2 : None if stop is None else stop * state.blocksize // 2]
            one = torch.ops.bitsandbytes.dequantize_4bit(
                piece, scales[start:stop], state.blocksize, state.quant_type, shape, dtype
            )
            parts.append(one.reshape(-1))
    return torch.cat(parts).reshape(state.shape)


def assert_same(ours: QuantizedTensor, theirs: QuantizedTensor) -> None:
    assert torch.equal(ours.codes, theirs.codes)
    assert ours.absmax.dtype == theirs.absmax.dtype
    assert torch.equal(ours.absmax, theirs.absmax)
    assert (ours.nested_absmax is None) == (theirs.nested_absmax is None)
    if ours.nested_absmax is not None and theirs.nested_absmax is not None:
        assert torch.equal(ours.nested_absmax, theirs.nested_absmax)
    rest = [replace(one, codes=0, absmax=0, nested_absmax=None) for one in (ours, theirs)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (33, 67), (1, 1), (300, 1000)])
def test_equal_to_bitsandbytes_to_the_bit(
    shape: tuple[int, int], dtype: torch.dtype, blocksize: int, double_quant: bool, type: str
) -> None:
    weight = normal(*shape, dtype=dtype)
    codes, state = quantize_4bit(weight, blocksize=blocksize, quant_type=type, compress_statistics=double_quant)
    ours = quantize(weight, type, blocksize, double_quant)
    assert_same(ours, from_bitsandbytes(codes, state))
    for wanted in DTYPES:
        assert torch.equal(restore(ours, wanted), bitsandbytes_values(codes, state, wanted))


SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 6e-8, -1.0, 0.5, 65504.0, -65504.0, 3e38, -3.4e38]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), type=st.sampled_from(["nf4", "fp4"]))
def test_equal_to_bitsandbytes_on_any_values(data: st.DataObject, dtype: torch.dtype, type: str) -> None:
    """Zeros of both signs, denormals, the largest values of each dtype, odd lengths, blocks longer than the tensor."""
    largest = torch.finfo(dtype).max
    values = st.one_of(st.sampled_from(SPECIAL), st.floats(-1, 1, width=32), st.floats(width=32, allow_nan=False))
    drawn = data.draw(st.lists(values, min_size=1, max_size=300))
    weight = torch.tensor(drawn).clamp(-largest, largest).to(dtype)
    blocksize = data.draw(st.sampled_from([64, 128, 4096]))
    codes, state = quantize_4bit(weight[None], blocksize=blocksize, quant_type=type, compress_statistics=False)
    ours = quantize(weight[None], type, blocksize)
    assert_same(ours, from_bitsandbytes(codes, state))
    state_values: Any = state  # bitsandbytes leaves the attributes untyped
    scales = state_values.absmax.repeat_interleave(blocksize)[: len(weight)]
    nibbles = torch.stack((codes[:, 0] >> 4, codes[:, 0] & 15), 1).reshape(-1)[: len(weight)]
    for wanted in DTYPES:
        assert torch.equal(restore(ours, wanted).reshape(-1), (state_values.code[nibbles.int()] * scales).to(wanted))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("elements", [64, 1, 63, 640])
def test_zeros_stay_zero(type: str, double_quant: bool, elements: int) -> None:
    assert torch.equal(restore(quantize(torch.zeros(elements), type, 64, double_quant)), torch.zeros(elements))


def test_a_block_of_zeros_beside_others_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1.0
    assert torch.equal(restore(quantize(weight)), weight)


def test_empty_tensor_has_no_blocks() -> None:
    quantized = quantize(torch.empty(0, 5), double_quant=True)
    assert (quantized.codes.shape, quantized.absmax.shape) == ((0, 1), (0,))
    assert restore(quantized).shape == (0, 5)


def test_double_quantization_takes_4127_thousandths_of_a_bit() -> None:
    """4 + 8/64 + 32/(64 * 256) = 4.12695, counted in bytes; 4.5 without."""
    weight = normal(1024, 1024)
    for double_quant, expected in ((True, 4.126953125), (False, 4.5)):
        stored = quantize(weight, double_quant=double_quant)
        parts = [part for part in (stored.codes, stored.absmax, stored.nested_absmax) if part is not None]
        assert 8 * sum(part.numel() * part.itemsize for part in parts) / weight.numel() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same(dtype: torch.dtype) -> None:
    weight = normal(1500, 2100, dtype=dtype).flatten()[:-1]
    before = torch.get_num_threads()
    results = []
    for threads, of_torch in ((1, 1), (3, 1), (None, 2), (None, 7)):
        torch.set_num_threads(of_torch)
        try:
            stored = quantize_tensor(weight, type="e2m1", blocksize=64, double_quant=True, threads=threads)
            results.append((stored, dequantize_into(stored, torch.empty_like(weight), threads=threads)))
            assert torch.get_num_threads() == of_torch
        finally:
            torch.set_num_threads(before)
    for stored, values in results[1:]:
        assert_same(stored, results[0][0])
        assert torch.equal(values, results[0][1])


def test_rows_apart_in_memory_are_read_in_order() -> None:
    weight = normal(70, 64)
    assert_same(quantize(weight.T), quantize(weight.T.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 5), (9, 32)])
def test_values_that_are_not_finite_are_counted_and_placed(
    dtype: torch.dtype, value: float, place: tuple[int, int]
) -> None:
    weight = normal(10, 33, dtype=dtype)
    quantize(weight)
    weight[place] = value
    weight[9, 32] = value
    count = 1 if place == (9, 32) else 2
    with pytest.raises(
        ModelError, match=rf"{count} of 330 weights are NaN or infinite, the first at \[{place[0]}, {place[1]}\]"
    ):
        quantize(weight)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak memory")
def test_16_bit_weights_are_not_widened_as_a_whole() -> None:
    weight = torch.ones(1 << 24, dtype=torch.bfloat16)
    quantize(weight[:64])
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    quantized = quantize_tensor(weight, type="nf4", blocksize=64, double_quant=False, threads=1)
    stored = quantized.codes.numel() + 4 * quantized.absmax.numel()
    assert _status_bytes("VmHWM") - before < stored + (8 << 20)


def _status_bytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_tensors_are_linear4bits_own(dtype: torch.dtype, type: str, double_quant: bool) -> None:
    weight = normal(40, 96, dtype=dtype)
    layer: Any = Linear4bit(96, 40, bias=False)
    make: Any = Params4bit  # its signature is hidden behind torch.nn.Parameter's
    layer.weight = make(weight, requires_grad=False, compress_statistics=double_quant, quant_type=type).to("cpu")
    theirs = layer.state_dict(prefix="model.layer.")
    quantized = quantize(weight, type, 64, double_quant)
    ours = {f"model.layer.weight{suffix}": part for suffix, part in to_bitsandbytes_tensors(quantized).items()}
    assert list(ours) == list(theirs)
    for name, part in ours.items():
        assert part.dtype == theirs[name].dtype
        assert torch.equal(part, theirs[name].data)
    assert_same(from_stored_tensors("model.layer.weight", theirs), quantized)


@pytest.mark.parametrize("type", ["e2m1", "int4"])
def test_own_types_are_stored_alike_and_refused_by_bitsandbytes(type: str) -> None:
    quantized = quantize(normal(33, 67), type, 128, True)
    stored = {f"w{suffix}": part for suffix, part in to_bitsandbytes_tensors(quantized).items()}
    assert_same(from_stored_tensors("w", stored), quantized)
    with pytest.raises(ValueError, match="bitsandbytes__nf4"):
        QuantState.from_dict({key[2:]: part for key, part in stored.items() if key != "w"}, torch.device("cpu"))


def test_damaged_parts_are_named() -> None:
    stored = {
        f"w{suffix}": part
        for suffix, part in to_bitsandbytes_tensors(quantize(normal(64, 64), double_quant=True)).items()
    }
    state = "w.quant_state.bitsandbytes__nf4"
    from_stored_tensors("w", stored)
    damages = {
        "not stored in 4 bits": {"w.absmax": None},
        "cannot be read": {state: stored[state][:-5]},
        "codes has 2047 elements": {"w": stored["w"][1:]},
        "absmax has 63 elements": {"w.absmax": stored["w.absmax"][1:]},
        "without nested_absmax": {"w.nested_absmax": None},
        "nested_absmax has 0 elements": {"w.nested_absmax": stored["w.nested_absmax"][:0]},
        "quant_map is not the codebook of nf4": {"w.quant_map": stored["w.quant_map"].flip(0)},
        "nested_quant_map is not": {"w.nested_quant_map": -stored["w.nested_quant_map"]},
    }
    for message, change in damages.items():
        parts = {key: part for key, part in {**stored, **change}.items() if part is not None}
        with pytest.raises(ModelError, match=message):
            from_stored_tensors("w", parts)


def test_codes_in_another_storage_dtype_are_read() -> None:
    weight = normal(64, 64)
    codes, state = quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    assert codes.dtype == torch.bfloat16
    assert_same(from_bitsandbytes(codes, state), quantize(weight))


@pytest.mark.parametrize("part", ["codes", "absmax", "nested_absmax"])
def test_parts_that_do_not_fit_the_shape_are_refused(part: str) -> None:
    quantized = quantize(normal(8, 90), double_quant=True)
    with pytest.raises(ModelError, match=rf"the tensor: {part} has"):
        restore(replace(quantized, **{part: getattr(quantized, part)[1:]}))


def test_constants_closer_than_float32_can_invert_are_restored() -> None:
    """Second level of denormal differences, one of them 0: none becomes NaN, and none is far off."""
    weight = torch.full((3, 64), 2e-38)
    weight[0] -= 1e-42
    weight[2] += 1e-42
    quantized = quantize(weight, double_quant=True)
    assert quantized.nested_absmax is not None
    assert 0 < quantized.nested_absmax.item() < 1.1e-42
    assert (restore(quantized) - weight).abs().max() <= 1e-43


def test_buffers_that_do_not_fit_are_refused() -> None:
    quantized = quantize(normal(8, 9))
    for out in (torch.empty(71), torch.empty(72, dtype=torch.float64), torch.empty(9, 8).T):
        with pytest.raises(ModelError, match=r"does not fit a tensor of shape \[8, 9\]; give a contiguous one of 72"):
            dequantize_into(quantized, out)
    with pytest.raises(ModelError, match="codes on cpu and a buffer on meta"):
        dequantize_into(quantized, torch.empty(72, device="meta"))


def test_wrong_settings_are_refused() -> None:
    weight = normal(4, 4)
    with pytest.raises(ConfigError, match="blocksize 96 is not possible; choose one of 64, 128"):
        quantize(weight, blocksize=96)
    with pytest.raises(ConfigError, match="0 threads cannot work"):
        quantize_tensor(weight, type="nf4", blocksize=64, double_quant=True, threads=0)
    with pytest.raises(ModelError, match=r"torch.float64 cannot be quantized; convert it to one of float32"):
        quantize(weight.double())
    with pytest.raises(ModelError, match="on meta cannot be quantized"):
        quantize(weight.to("meta"))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lookup_without_a_kernel_gives_the_same(type: str, dtype: torch.dtype) -> None:
    quantized = quantize(normal(5, 67), type, 128)
    assert torch.equal(look_up(quantized, quantized.absmax, torch.empty(5, 67, dtype=dtype)), restore(quantized, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_stores_what_the_cpu_stores(type: str, dtype: torch.dtype) -> None:
    weight = normal(1000, 1030, dtype=dtype)
    on_cpu, on_gpu = quantize(weight, type), quantize(weight.cuda(), type)
    assert on_gpu.codes.is_cuda
    assert torch.equal(on_cpu.absmax, on_gpu.absmax.cpu())
    if type != "fp4":  # there the two give zero different codes, and round ties differently
        assert (on_cpu.codes != on_gpu.codes.cpu()).float().mean() <= 1e-6
    values = dequantize_into(on_gpu, torch.empty(weight.shape, dtype=dtype, device="cuda")).cpu()
    assert (values != restore(on_cpu, dtype)).float().mean() <= (1e-6 if type != "fp4" else 2e-3)
