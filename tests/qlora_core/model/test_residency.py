"""Every way a 4-bit layer can execute gives bitsandbytes' own bits on the CPU, and leaves what is stored alone."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError
from qlora_core.model.base import load_quantized
from qlora_core.model.residency.layers import (
    BitsandbytesLinear4bit,
    DenseLinear4bit,
    ScratchLinear4bit,
    set_residency,
)
from qlora_core.model.residency.scratch import shared_scratch
from qlora_core.quantization.dequantize import dequantize_exact
from qlora_core.quantization.quantize import quantize_checkpoint

WAYS = ["dense", "scratch", "bitsandbytes"]
Shape = tuple[int, int]


def stock_layer(shape: Shape, *, type: str = "nf4", blocksize: int = 64, bias: bool = False, seed: int = 0) -> Any:
    """bitsandbytes' own layer of [in, out] features, quantized by bitsandbytes."""
    generator = torch.Generator().manual_seed(seed)
    make: Any = Params4bit
    layer: Any = Linear4bit(*shape, bias=bias, compute_dtype=torch.float32, quant_type=type)
    weight = torch.randn(shape[::-1], generator=generator)
    layer.weight = make(weight, requires_grad=False, quant_type=type, blocksize=blocksize, module=layer).to("cpu")
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(shape[1], generator=generator), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False
    return layer


def in_residency(layer: Any, residency: Any, dtype: torch.dtype = torch.float32) -> Any:
    changed = copy.deepcopy(layer)
    set_residency(changed, residency, dtype)
    return changed


def forward_backward(layer: Any, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), gradient


def random_pair(layer: Any, *rows: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn((*rows, layer.in_features), generator=generator),
        torch.randn((*rows, layer.out_features), generator=generator),
    )


@pytest.mark.parametrize("residency", WAYS)
@pytest.mark.parametrize("rows", [(1,), (3, 7), (2, 0)])
@pytest.mark.parametrize(("type", "blocksize"), [("nf4", 64), ("nf4", 128), ("fp4", 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_bitsandbytes_to_the_bit(
    residency: str, rows: tuple[int, ...], type: str, blocksize: int, bias: bool
) -> None:
    stock = stock_layer((256, 192), type=type, blocksize=blocksize, bias=bias)
    x, upstream = random_pair(stock, *rows)
    expected = forward_backward(stock, x, upstream)
    found = forward_backward(in_residency(stock, residency), x, upstream)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    with torch.inference_mode():
        assert torch.equal(in_residency(stock, residency)(x), expected[0])


@pytest.mark.parametrize("shape", [(96, 40), (33, 5), (1, 7)])
def test_blocks_that_cross_rows_come_out_alike_and_right(shape: Shape) -> None:
    """The reference is the product in float64 with the exactly dequantized weight."""
    stock = stock_layer(shape)
    weight = dequantize_exact(stock.weight.data, stock.weight.quant_state, torch.float32).double()
    x, upstream = random_pair(stock, 4)
    found = [forward_backward(in_residency(stock, residency), x, upstream) for residency in WAYS]
    for y, gradient in found:
        assert torch.equal(y, found[0][0])
        assert torch.equal(gradient, found[0][1])
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), upstream.double() @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residency", WAYS)
def test_input_of_another_dtype_comes_back_in_its_own(residency: str) -> None:
    layer = in_residency(stock_layer((64, 32), bias=True), residency)
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


def test_scratch_is_one_buffer_as_large_as_the_largest_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_core.model.residency.scratch._shared", weakref.WeakValueDictionary())
    layers = [in_residency(stock_layer(shape), "scratch") for shape in [(64, 32), (128, 96), (64, 64)]]
    assert all(layer.scratch is shared_scratch() for layer in layers)
    assert shared_scratch().reserve(1, torch.device("cpu"), torch.float32).numel() == 128 * 96
    gone = weakref.ref(shared_scratch())
    del layers
    gc.collect()
    assert gone() is None, "the scratch must be freed with its last layer"


def test_scratch_may_be_overwritten_between_forward_and_backward() -> None:
    """Two layers, one after the other, over one buffer: had the first one's weight been saved, it would be lost."""
    stock = [stock_layer((64, 64), seed=seed) for seed in (1, 2)]
    x, upstream = random_pair(stock[0], 5)
    expected = forward_backward(torch.nn.Sequential(*stock), x, upstream)
    chain = torch.nn.Sequential(*[in_residency(layer, "scratch") for layer in stock])
    found = forward_backward(chain, x, upstream)
    assert torch.equal(found[1], expected[1])
    # The control: a plain product with a view of the scratch, as it must not be done
    buffer = torch.empty(64, 64)
    saved = x.clone().requires_grad_()
    y = torch.nn.functional.linear(saved, buffer.copy_(torch.ones(64, 64)).detach())
    buffer.numpy()[:] = 0.0
    (gradient,) = torch.autograd.grad(y, saved, upstream)
    assert not gradient.any()


def test_second_derivatives_are_refused() -> None:
    layer = in_residency(stock_layer((64, 64)), "scratch")
    x = torch.ones(1, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_scratch_made_in_inference_mode_serves_training_later() -> None:
    layer = in_residency(stock_layer((64, 64)), "scratch")
    layer.scratch = type(layer.scratch)()  # a fresh one, first used within inference mode
    x, upstream = random_pair(layer, 2)
    with torch.inference_mode():
        layer(x)
    assert torch.equal(forward_backward(layer, x, upstream)[1], forward_backward(stock_layer((64, 64)), x, upstream)[1])


def test_threads_do_not_share_the_scratch() -> None:
    """Four threads train layers of one shape at once; shared, a buffer would hold another thread's weight."""
    stocks = [stock_layer((256, 256), seed=seed) for seed in range(4)]
    layers = [in_residency(stock, "scratch") for stock in stocks]
    x, upstream = random_pair(stocks[0], 8)
    expected = [forward_backward(stock, x, upstream) for stock in stocks]
    wrong: list[int] = []
    start = threading.Barrier(len(layers))

    def train(place: int) -> None:
        start.wait()
        for _ in range(50):
            found = forward_backward(layers[place], x, upstream)
            if not all(torch.equal(a, b) for a, b in zip(found, expected[place], strict=True)):
                wrong.append(place)

    threads = [threading.Thread(target=train, args=(place,)) for place in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])  # noqa: S301
@pytest.mark.parametrize("residency", WAYS)
def test_copies_compute_the_same_and_stand_alone(residency: str, copied: Callable[[Any], Any]) -> None:
    layer = in_residency(stock_layer((64, 32), bias=True), residency)
    x, upstream = random_pair(layer, 3)
    expected = forward_backward(layer, x, upstream)
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    layer.weight.data.zero_()
    found = forward_backward(twin, x, upstream)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("residency", WAYS)
def test_a_weight_put_in_place_of_the_old_one_is_used(residency: str) -> None:
    """As PEFT's merge does it."""
    layer, other = in_residency(stock_layer((64, 32), seed=1), residency), stock_layer((64, 32), seed=2)
    x, upstream = random_pair(layer, 3)
    layer(x)
    layer.weight = other.weight
    assert torch.equal(forward_backward(layer, x, upstream)[1], forward_backward(other, x, upstream)[1])


@pytest.mark.parametrize("residency", WAYS)
def test_codes_that_are_loaded_into_a_layer_are_used(residency: str) -> None:
    """bitsandbytes' layer takes the codes of a `state_dict` and keeps its own constants, so these are made alike."""
    layer, other = in_residency(stock_layer((64, 32), seed=1), residency), stock_layer((64, 32), seed=2)
    other.weight.quant_state = copy.deepcopy(layer.weight.quant_state)
    x, upstream = random_pair(layer, 3)
    layer(x)
    layer.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(forward_backward(layer, x, upstream)[1], forward_backward(other, x, upstream)[1])


@pytest.mark.parametrize("residency", WAYS)
def test_moving_and_casting_a_layer_leaves_its_values(residency: str) -> None:
    layer = in_residency(stock_layer((64, 32)), residency)
    x, upstream = random_pair(layer, 3)
    expected = forward_backward(layer, x, upstream)
    for changed in (layer.to("cpu"), layer.half(), layer.double()):
        assert torch.equal(forward_backward(changed, x, upstream)[1], expected[1])


def test_a_layer_changes_its_residency_and_back() -> None:
    layer = in_residency(stock_layer((64, 32)), "dense")
    x, upstream = random_pair(layer, 3)
    expected = forward_backward(layer, x, upstream)
    for residency, kind in [("scratch", ScratchLinear4bit), ("bitsandbytes", BitsandbytesLinear4bit)]:
        set_residency(layer, residency, torch.float32)
        assert type(layer) is kind
        assert [name for name, _ in layer.named_buffers()] == []
        assert torch.equal(forward_backward(layer, x, upstream)[1], expected[1])
    set_residency(layer, "dense", torch.float32)
    assert type(layer) is DenseLinear4bit
    assert layer.dense_weight.shape == (32, 64)


@pytest.mark.parametrize("residency", WAYS)
def test_state_dict_is_that_of_bitsandbytes(residency: str) -> None:
    stock = stock_layer((64, 32), bias=True)
    stock.weight.quant_state.dtype = torch.bfloat16
    expected, found = stock.state_dict(), in_residency(stock, residency).state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Whole models


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([[1, 40, 50, 60], [1, 9, 8, 7]])).logits.clone()


@pytest.fixture(scope="module")
def models(nf4_folder: Path) -> dict[str, PreTrainedModel]:
    return {residency: load_quantized(nf4_folder, device="cpu", residency=residency) for residency in WAYS}


def test_loaded_models_agree_to_the_bit(models: dict[str, PreTrainedModel]) -> None:
    expected = logits_of(models["bitsandbytes"])
    assert all(torch.equal(logits_of(model), expected) for model in models.values())


@pytest.mark.parametrize("residency", WAYS)
def test_saved_model_has_the_tensors_it_was_loaded_from(nf4_folder: Path, tmp_path: Path, residency: str) -> None:
    load_quantized(nf4_folder, device="cpu", residency=residency).save_pretrained(tmp_path)
    expected, found = load_file(nf4_folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert stock.is_loaded_in_4bit


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_alike_in_every_residency(nf4_folder: Path, checkpointing: bool) -> None:
    """AdamW through PEFT, with its dropout and gradient checkpointing: equal losses and weights, to the bit."""
    losses, weights = [], []
    for residency in WAYS:
        torch.manual_seed(0)
        base = load_quantized(nf4_folder, device="cpu", residency=residency)
        settings = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
        model: Any = get_peft_model(base, settings)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        tokens = torch.randint(3, 98, (3, 12), generator=torch.Generator().manual_seed(1))
        for _ in range(4):
            loss = model(input_ids=tokens, labels=tokens).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trained]))
    assert losses[0] > losses[3] > 0
    assert losses[:4] == losses[4:8] == losses[8:]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("residency", ["dense", "scratch"])
def test_merging_an_adapter_changes_what_the_layers_compute(nf4_folder: Path, residency: str) -> None:
    base = load_quantized(nf4_folder, device="cpu", residency=residency)
    before = logits_of(base)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.merge_adapter()
    assert not torch.equal(logits_of(model), before)


@pytest.fixture(scope="module", params=["int4", "e2m1"])
def own_folder(request: pytest.FixtureRequest, plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / request.param
    quantize_checkpoint(plain_folder, folder, QuantizeConfig(type=request.param))
    return folder


def test_types_that_bitsandbytes_lacks_run_dense_and_through_the_scratch(own_folder: Path, tmp_path: Path) -> None:
    models = {way: load_quantized(own_folder, device="cpu", residency=way) for way in ("dense", "scratch", "auto")}
    logits = [logits_of(model) for model in models.values()]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    models["scratch"].save_pretrained(tmp_path)
    expected, found = load_file(own_folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(logits_of(load_quantized(tmp_path, device="cpu")), logits[0])


def test_bitsandbytes_is_not_asked_to_run_what_it_has_no_kernels_for(own_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"bitsandbytes cannot run 14 layers .* auto, dense or scratch"):
        load_quantized(own_folder, device="cpu", residency="bitsandbytes")
    with pytest.raises(ModelError, match="cannot run 2 layers"):
        load_quantized(own_folder, device="cpu", layer_residency={"*.up_proj": "bitsandbytes"})


def test_own_types_carry_adapters(own_folder: Path) -> None:
    base = load_quantized(own_folder, device="cpu")
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14
    assert all(gradient is not None and gradient.any() for gradient in gradients)
