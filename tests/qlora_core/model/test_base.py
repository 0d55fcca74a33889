from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.base import choose_precision, load_any, load_plain, load_quantized
from qlora_core.quantization.dequantize import dequantize_exact
from qlora_core.quantization.quantize import quantize_checkpoint


def linears(model: PreTrainedModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def test_loaded_base_is_frozen_4_bit_and_without_cache(shared_model: PreTrainedModel) -> None:
    assert len(linears(shared_model)) == 14
    assert not any(parameter.requires_grad for parameter in shared_model.parameters())
    assert not shared_model.training
    assert shared_model.config.use_cache is False


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("float32", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_precision_follows_setting_and_device(precision: str, device: str, dtype: torch.dtype) -> None:
    assert choose_precision(precision, device) == dtype


def test_auto_precision_on_a_gpu_follows_its_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_precision("auto", "cuda:0") == dtype


def test_unknown_precision_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'fp8' is unknown; choose auto, float32 or bfloat16"):
        choose_precision("fp8", "cpu")


def test_everything_but_the_codes_takes_the_precision(nf4_folder: Path) -> None:
    model = load_quantized(nf4_folder, precision="bfloat16", device="cpu")
    dtypes = {parameter.dtype for parameter in model.parameters() if not isinstance(parameter, Params4bit)}
    assert dtypes == {torch.bfloat16}
    assert {module.compute_dtype for module in linears(model).values()} == {torch.bfloat16}
    # Rounded to bf16, positions above 256 would fall together
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.fixture(scope="module")
def bf16_folder(plain_folder: Path) -> Path:
    """The same base from a bfloat16 checkpoint: bitsandbytes remembers that dtype for its backward pass."""
    source, folder = plain_folder.parent / "plain-bf16", plain_folder.parent / "nf4-bf16"
    model: Any = load_plain(plain_folder, device="cpu")
    model.to(torch.bfloat16).save_pretrained(source)
    for path in plain_folder.glob("tokenizer*"):
        (source / path.name).write_bytes(path.read_bytes())
    quantize_checkpoint(source, folder, QuantizeConfig())
    return folder


@pytest.mark.parametrize("source", ["nf4_folder", "bf16_folder"])
def test_every_layer_computes_with_its_stored_values(request: pytest.FixtureRequest, source: str) -> None:
    """Output and input gradient against float64 products with the dequantized weight, blocks crossing rows or not."""
    generator = torch.Generator().manual_seed(0)
    for name, module in linears(load_quantized(request.getfixturevalue(source), device="cpu")).items():
        weight = dequantize_exact(module.weight.data, module.weight.quant_state, torch.float32).double()
        x = torch.randn((3, 5, module.in_features), generator=generator, requires_grad=True)
        upstream = torch.randn((3, 5, module.out_features), generator=generator)
        y = module(x)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        expected, expected_gradient = x.double() @ weight.T, upstream.double() @ weight
        assert (y - expected).abs().max() < 1e-5 * expected.abs().max(), name
        assert (gradient - expected_gradient).abs().max() < 1e-5 * expected_gradient.abs().max(), name


def test_evaluating_leaves_the_stored_codes_alone(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks them at the first evaluation, and computes in bf16 from then on."""
    before = {name: module.weight.data.clone() for name, module in linears(model).items()}
    with torch.inference_mode():
        first = model(torch.tensor([[1, 40, 50]])).logits
        second = model(torch.tensor([[1, 40, 50]])).logits
    assert torch.equal(first, second)
    for name, module in linears(model).items():
        assert torch.equal(module.weight.data, before[name])
        assert module.weight.quant_state.dtype == torch.float32


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512-BF16, so bitsandbytes does not repack here")
def test_stock_load_does_repack_on_this_cpu(nf4_folder: Path) -> None:
    """The control of the test above: if this fails, bitsandbytes has changed and the guard may go."""
    module = AutoModelForCausalLM.from_pretrained(nf4_folder, device_map={"": "cpu"}).model.layers[0].self_attn.q_proj
    before = module.weight.data.clone()
    with torch.inference_mode():
        module(torch.ones(1, 1, 64))
    assert module.weight.quant_state.dtype == torch.bfloat16
    assert not torch.equal(module.weight.data.reshape(-1), before.reshape(-1))


def test_load_any_takes_both_kinds(plain_folder: Path, nf4_folder: Path) -> None:
    plain, quantized = load_any(plain_folder, device="cpu"), load_any(nf4_folder, device="cpu")
    assert not linears(plain)
    assert linears(quantized)
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert plain.config.use_cache is False


def test_plain_folder_is_no_quantized_one(plain_folder: Path, nf4_folder: Path) -> None:
    with pytest.raises(ModelError, match="no bitsandbytes 4-bit checkpoint; make one with `qlora quantize"):
        load_quantized(plain_folder)
    with pytest.raises(ModelError, match="already quantized"):
        load_plain(nf4_folder)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_truncated_quantized_weights_are_named(nf4_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(nf4_folder, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="truncated or damaged"):
        load_quantized(folder)


def test_folder_that_misdescribes_its_weights_is_refused(nf4_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(nf4_folder, tmp_path / "lying")
    report = folder / "quantization.json"
    report.write_text(report.read_text().replace('"blocksize": 64', '"blocksize": 128'))
    with pytest.raises(ModelError, match="blocksize 64, not 128"):
        load_quantized(folder)


def test_code_table_is_nf4(shared_model: PreTrainedModel) -> None:
    states = [module.weight.quant_state for module in linears(shared_model).values()]
    assert all(torch.equal(state.code, get_4bit_type("nf4", device="cpu")) for state in states)
