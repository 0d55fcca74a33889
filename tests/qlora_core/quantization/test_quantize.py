import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError
from qlora_core.quantization.audit import StorageFormat, audit_quantized
from qlora_core.quantization.dequantize import dequantize_exact
from qlora_core.quantization.publish import quantize_folder
from qlora_core.quantization.quantize import quantize_checkpoint

MakeLlama = Callable[..., Path]
LAYERS = 14  # 2 decoder layers with 4 attention and 3 feed-forward Linears each


def stock_load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})


def on_the_fly(source: Path, *, double_quant: bool) -> Any:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, device_map={"": "cpu"})


@pytest.mark.parametrize("double_quant", [True, False])
def test_stock_transformers_loads_what_it_would_have_quantized_itself(
    make_llama: MakeLlama, tmp_path: Path, double_quant: bool
) -> None:
    source = make_llama(shard_size="200KB")
    quantize_checkpoint(source, tmp_path / "out", QuantizeConfig(double_quant=double_quant))
    stored, fresh = stock_load(tmp_path / "out"), on_the_fly(source, double_quant=double_quant)
    expected = dict(fresh.named_parameters())
    for name, parameter in stored.named_parameters():
        assert torch.equal(parameter.data, expected[name].data), name
        if isinstance(parameter, Params4bit):
            assert torch.equal(parameter.quant_state.absmax, expected[name].quant_state.absmax)
            assert parameter.quant_state.nested == double_quant
    # Training mode: in eval mode bitsandbytes repacks to bf16 on some CPUs, and cannot do so for this width
    ids = torch.tensor([[1, 40, 60, 80]])
    assert torch.equal(stored.train()(ids).logits, fresh.train()(ids).logits)


def test_report_agrees_with_the_files_and_with_a_float64_reference(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama(hidden=64, intermediate=256)
    report = quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())
    assert json.loads((tmp_path / "out" / "quantization.json").read_text()) == report
    weights, restored = load_file(source / "model.safetensors"), stock_load(tmp_path / "out")
    assert len(report["layers"]) == LAYERS
    squares = error_squares = 0.0
    for layer in report["layers"]:
        exact = weights[f"{layer['name']}.weight"].double()
        stored = restored.get_submodule(layer["name"]).weight
        error = dequantize_exact(stored.data, stored.quant_state, torch.float32).double() - exact
        assert layer["shape"] == list(exact.shape)
        assert layer["relative_l2"] == pytest.approx((error.norm() / exact.norm()).item(), rel=1e-9)
        assert layer["max_error"] == pytest.approx(error.abs().max().item(), rel=1e-12)
        squares, error_squares = squares + exact.square().sum().item(), error_squares + error.square().sum().item()
    assert report["relative_l2"] == pytest.approx(math.sqrt(error_squares / squares), rel=1e-9)
    assert 0.08 < report["relative_l2"] < 0.10
    assert report["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert report["seconds"] > 0
    assert report["peak_rss_bytes"] > 50_000_000


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_per_parameter_come_from_the_bytes(
    make_llama: MakeLlama, tmp_path: Path, double_quant: bool, bits: float
) -> None:
    """4 + 8/64 + 32/(64*256) and 4 + 32/64; weights of 256 x 256 fill whole blocks of both levels."""
    source = make_llama(hidden=256, intermediate=256)
    report = quantize_checkpoint(source, tmp_path / "out", QuantizeConfig(double_quant=double_quant))
    assert report["bits_per_parameter"] == pytest.approx(bits, abs=5e-4)


def test_tokenizer_and_generation_settings_come_along(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama()
    # transformers refuses to save this combination itself
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7, "eos_token_id": 2}')
    quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())
    text = "Hello there"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    kept = (tmp_path / "out" / "generation_config.json").read_text()
    assert kept == (source / "generation_config.json").read_text()


@pytest.mark.parametrize(("tied", "skip_modules"), [(True, ["lm_head"]), (False, []), (False, ["lm_head", "o_proj"])])
def test_head_embeddings_norms_and_skipped_modules_stay_exact(
    make_llama: MakeLlama, tmp_path: Path, tied: bool, skip_modules: list[str]
) -> None:
    source = make_llama(tied=tied)
    report = quantize_checkpoint(source, tmp_path / "out", QuantizeConfig(skip_modules=skip_modules))
    loaded = stock_load(tmp_path / "out")
    assert not isinstance(loaded.lm_head, Linear4bit)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    weights, parameters = load_file(source / "model.safetensors"), dict(loaded.named_parameters())
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(report["kept"])
    for name in report["kept"]:
        assert torch.equal(parameters[name], weights[name]), name
    assert len(report["layers"]) == LAYERS - 2 * ("o_proj" in skip_modules)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_checkpoints_keep_their_dtype(make_llama: MakeLlama, tmp_path: Path, dtype: torch.dtype) -> None:
    report = quantize_checkpoint(make_llama(dtype=dtype), tmp_path / "out", QuantizeConfig(double_quant=False))
    loaded = stock_load(tmp_path / "out")
    assert loaded.model.norm.weight.dtype == dtype
    assert loaded.model.layers[0].mlp.up_proj.weight.quant_state.absmax.dtype == torch.float32
    assert 0.08 < report["relative_l2"] < 0.10


@pytest.mark.parametrize("blocksize", [128, 4096])
def test_other_blocksizes_load_with_stock_transformers(
    make_llama: MakeLlama, tmp_path: Path, blocksize: Literal[128, 4096]
) -> None:
    report = quantize_checkpoint(make_llama(), tmp_path / "out", QuantizeConfig(blocksize=blocksize))
    weight = stock_load(tmp_path / "out").model.layers[0].mlp.down_proj.weight
    assert weight.quant_state.blocksize == blocksize
    assert report["relative_l2"] < 0.14  # larger blocks are coarser, but blocks read from the wrong place give > 0.2


def test_fp4_is_stored_as_fp4(make_llama: MakeLlama, tmp_path: Path) -> None:
    report = quantize_checkpoint(make_llama(), tmp_path / "out", QuantizeConfig(type="fp4"))
    assert stock_load(tmp_path / "out").model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "fp4"
    assert report["relative_l2"] > 0.11  # bitsandbytes' fp4 on N(0,1): .122, NF4: .092


def test_gpt2_layers_are_quantized_in_linear_orientation(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama()
    for path in source.glob("*model*"):
        path.unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=1, n_head=2)).save_pretrained(source)
    report = quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())
    shapes = {layer["name"]: layer["shape"] for layer in report["layers"]}
    assert shapes["transformer.h.0.mlp.c_fc"] == [256, 64]
    assert stock_load(tmp_path / "out").transformer.h[0].attn.c_attn.bias.shape == (192,)


@pytest.mark.parametrize(
    ("name", "value"), [("model.layers.1.mlp.down_proj.weight", math.inf), ("model.norm.weight", math.nan)]
)
def test_weights_that_are_not_finite_are_named(make_llama: MakeLlama, tmp_path: Path, name: str, value: float) -> None:
    source = make_llama()
    weights = load_file(source / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinity"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())
    assert not (tmp_path / "out").exists()


def test_checkpoint_that_lacks_a_weight_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama()
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*layers\.1\.mlp\.down_proj"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())


def test_config_that_does_not_fit_the_weights_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 200}))
    with pytest.raises(ModelError, match=r"does config\.json fit the weights"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())


@pytest.mark.parametrize("model_type", ["llamma", "longt5"])
def test_architecture_without_a_causal_language_model_is_refused(
    make_llama: MakeLlama, tmp_path: Path, model_type: str
) -> None:
    source = make_llama()
    config = json.loads((source / "config.json").read_text())
    changed = {**config, "model_type": model_type, "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    (source / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=f"model_type '{model_type}' .*its own code .* never run"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())


def test_mixture_of_experts_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama()
    for path in source.glob("*model*"):
        path.unlink()
    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=32,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(source)
    with pytest.raises(ModelError, match="fused experts"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())


def test_quantizing_twice_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    quantize_checkpoint(make_llama(), tmp_path / "once", QuantizeConfig())
    with pytest.raises(ModelError, match="already quantized"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", QuantizeConfig())


def test_folder_in_use_is_refused_and_left_alone(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama()
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(ModelError, match="not empty"):
        quantize_checkpoint(source, source, QuantizeConfig())
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_failed_command_leaves_nothing_under_the_target(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama()
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        quantize_folder(source, tmp_path / "made" / "out", QuantizeConfig())
    assert list((tmp_path / "made").iterdir()) == []


def wanted(**changes: object) -> StorageFormat:
    settings: dict[str, Any] = {
        "quant_type": "nf4",
        "double_quant": True,
        "skip_modules": ("lm_head",),
        "blocksize": 64,
    }
    return StorageFormat(**{**settings, **changes})


def test_audit_passes_what_was_asked_for_and_names_what_was_not(make_llama: MakeLlama, tmp_path: Path) -> None:
    quantize_checkpoint(make_llama(), tmp_path / "out", QuantizeConfig())
    model = stock_load(tmp_path / "out")
    assert len(audit_quantized(model, wanted())) == LAYERS
    for changes, complaint in [
        ({"quant_type": "fp4"}, "stored as nf4, not fp4"),
        ({"double_quant": False}, "double quantization is True"),
        ({"blocksize": 128}, "blocksize 64, not 128"),
        ({"skip_modules": ()}, "lm_head: is a Linear of torch.float32, not 4-bit"),
        ({"skip_modules": ("lm_head", "q_proj")}, r"q_proj\.weight: stored in 4 bits"),
    ]:
        with pytest.raises(ModelError, match=complaint):
            audit_quantized(model, wanted(**changes))


def test_audit_notices_one_layer_left_in_full_precision(make_llama: MakeLlama, tmp_path: Path) -> None:
    quantize_checkpoint(make_llama(), tmp_path / "out", QuantizeConfig())
    model = stock_load(tmp_path / "out")
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(64, 32, bias=False)
    with pytest.raises(ModelError, match=r"1 faults.*layers\.1\.self_attn\.v_proj: is a Linear"):
        audit_quantized(model, wanted())
