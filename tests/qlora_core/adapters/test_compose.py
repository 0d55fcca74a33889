import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_core.adapters.adapter_folder import adapter_digest
from qlora_core.adapters.compose import compose
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import attach_adapter
from qlora_core.model.base import load_quantized
from qlora_core.quantization.dequantize import dequantize_exact
from qlora_core.quantization.quantize import quantize_checkpoint

WriteAdapter = Callable[..., Path]
TOKENS = torch.tensor([[1, 40, 50, 60, 9], [1, 70, 71, 72, 8], [1, 33, 34, 35, 36], [1, 5, 6, 7, 50]])


def logits(model: PreTrainedModel | PeftModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def dense_base(base: Path) -> PreTrainedModel:
    """The quantized base with its dequantized weights in plain layers, which can be taken to float64."""
    model: Any = load_quantized(base, device="cpu")
    weights = {
        name: dequantize_exact(module.weight.data, module.weight.quant_state, torch.float32)  # pyright: ignore
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    for name, weight in weights.items():
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, plain)
    model.is_loaded_in_4bit = model.is_quantized = False
    del model.config.quantization_config, model.hf_quantizer
    return model


def dynamic(base: Path, parts: dict[str, tuple[Path, float]]) -> PeftModel:
    """Stock PEFT with all adapters active at once, each B times its weight: what a composition is to equal."""
    model: Any = None
    for name, (folder, weight) in parts.items():
        if model is None:
            model = PeftModel.from_pretrained(dense_base(base), str(folder), adapter_name=name)
        else:
            model.load_adapter(str(folder), adapter_name=name)
        for parameter_name, parameter in model.named_parameters():
            if f".lora_B.{name}." in parameter_name:
                parameter.data.mul_(weight)
    model.base_model.set_adapter(list(parts))
    return model.eval()


def exact_logits(model: PeftModel | PreTrainedModel) -> torch.Tensor:
    """In float64, so that what differs is the adapters' factors and not the order of the base's float32 sums."""
    return logits(model.double())


def recipe(folder: Path, **content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def parent(path: Path, **own: Any) -> dict[str, Any]:
    return {"path": str(path), **own}


def largest_share(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> float:
    """The largest logit error over the largest effect of the adapters."""
    return ((found - expected).abs().max() / (expected - base).abs().max()).item()


@pytest.mark.parametrize("method", ["sum", "weighted", "cat"])
@pytest.mark.parametrize("rank", [None, 19])
def test_exact_methods_and_compression_at_summed_rank_equal_the_dynamic_adapters(
    method: str, rank: int | None, nf4_folder: Path, adapters: dict[str, Path], model: PreTrainedModel, tmp_path: Path
) -> None:
    """19 is the sum of ranks on q_proj: 4 + 8 + 6 + 1. Unlike scales, rsLoRA, patterns and targets among them."""
    weights = dict.fromkeys(("second", "rs", "patterns", "one_layer"), 1.0)
    if method != "sum":
        weights = {"second": 0.6, "rs": 0.4, "patterns": -1.5, "one_layer": 1.0}
    parents = [parent(adapters[name], **({} if method == "sum" else {"weight": w})) for name, w in weights.items()]
    result = compose(recipe(tmp_path / "r", method=method, rank=rank, adapters=parents), tmp_path / "out")
    expected = exact_logits(dynamic(nf4_folder, {name: (adapters[name], weight) for name, weight in weights.items()}))
    found = exact_logits(PeftModel.from_pretrained(dense_base(nf4_folder), tmp_path / "out").eval())
    assert (found - expected).abs().max().item() <= 1e-6
    assert (expected - logits(model)).abs().max() > 0.05  # the adapters do something
    assert result["weights"] == weights
    assert result["rank"] == 19
    assert result["relative_error"] <= 1e-6


def test_stock_peft_gets_the_same_sum_wrong(
    nf4_folder: Path, adapters: dict[str, Path], model: PreTrainedModel, tmp_path: Path
) -> None:
    """Negative control (peft 0.21.2): rsLoRA sources are rescaled, and `linear` works on A and B apart."""
    for name, combination in (("rs", "cat"), ("plain", "linear")):
        other = {"rs": "second", "plain": "second"}[name]
        stock = dynamic(nf4_folder, {name: (adapters[name], 1.0), other: (adapters[other], 1.0)})
        expected = logits(stock)
        if combination == "linear":
            same_rank = {"one": (adapters["plain"], 0.6), "two": (_rank_four(adapters, tmp_path), 0.4)}
            expected = logits(dynamic(nf4_folder, same_rank))
            stock = dynamic(nf4_folder, {key: (folder, 1.0) for key, (folder, _) in same_rank.items()})
            stock.add_weighted_adapter(["one", "two"], [0.6, 0.4], "both", combination_type="linear")
        else:
            stock.add_weighted_adapter([name, other], [1.0, 1.0], "both", combination_type="cat")
        stock.set_adapter("both")
        assert largest_share(logits(stock), expected, logits(model)) > 0.05, combination


def _rank_four(adapters: dict[str, Path], folder: Path) -> Path:
    """Another adapter of `plain`'s rank, which is what `linear` asks for."""
    target = copytree(adapters["plain"], folder / "kin")
    tensors = load_file(target / "adapter_model.safetensors")
    rolled = {name: tensor.roll(1, dims=1).contiguous() for name, tensor in tensors.items()}
    save_file(rolled, target / "adapter_model.safetensors")
    return target


def test_an_adapter_and_its_negation_cancel(
    nf4_folder: Path, adapters: dict[str, Path], model: PreTrainedModel, tmp_path: Path
) -> None:
    compose(recipe(tmp_path / "r", method="negate", adapters=[parent(adapters["rs"])]), tmp_path / "negated")
    both = dynamic(nf4_folder, {"rs": (adapters["rs"], 1.0), "negated": (tmp_path / "negated", 1.0)})
    assert (exact_logits(both) - exact_logits(dense_base(nf4_folder))).abs().max() <= 1e-6
    assert (logits(dynamic(nf4_folder, {"rs": (adapters["rs"], 1.0)})) - logits(model)).abs().max() > 0.05


def test_compression_states_the_error_that_a_float64_svd_finds(adapters: dict[str, Path], tmp_path: Path) -> None:
    parents = [parent(adapters["plain"], weight=0.6), parent(adapters["second"], weight=0.4)]
    result = compose(recipe(tmp_path / "r", rank=5, adapters=parents), tmp_path / "out")
    error = norm = 0.0
    composed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    sources = [(load_file(adapters["plain"] / "adapter_model.safetensors"), 0.6 * 6 / 4),
               (load_file(adapters["second"] / "adapter_model.safetensors"), 0.4 * 16 / 8)]  # fmt: skip
    for name in [name for name in composed if "lora_A" in name]:
        whole = sum(s * t[name.replace("_A", "_B")].double() @ t[name].double() for t, s in sources)
        assert isinstance(whole, torch.Tensor)
        values = torch.linalg.svdvals(whole)
        kept = composed[name.replace("_A", "_B")].double() @ composed[name].double()
        assert (whole - kept).norm().item() == pytest.approx(values[5:].norm().item(), rel=1e-5)
        error, norm = error + values[5:].square().sum().item(), norm + values.square().sum().item()
    assert result["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-6)
    assert result["relative_error"] > 0.1
    assert result["norm"] == pytest.approx(norm**0.5, rel=1e-6)


def test_the_same_recipe_gives_the_same_bytes_and_is_found_again(adapters: dict[str, Path], tmp_path: Path) -> None:
    parents = [parent(adapters["plain"], weight=0.5), parent(adapters["second"])]
    first = compose(recipe(tmp_path / "r", method="dare", rank=12, seed=3, adapters=parents), tmp_path / "one")
    again = compose(tmp_path / "r" / "recipe.yaml", tmp_path / "two")
    found = compose(tmp_path / "r" / "recipe.yaml", tmp_path / "one")
    other = compose(recipe(tmp_path / "s", method="dare", rank=12, seed=4, adapters=parents), tmp_path / "three")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert weights[0] == weights[1] != weights[2]
    assert (first["cached"], again["cached"], found["cached"]) == (False, False, True)
    assert first["recipe"] == again["recipe"] == found["recipe"] != other["recipe"]
    with pytest.raises(ConfigError, match="not this recipe's result"):
        compose(tmp_path / "s" / "recipe.yaml", tmp_path / "one")


def test_stock_dare_has_no_seed(nf4_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Negative control (peft 0.21.2): two calls differ."""
    stock = dynamic(nf4_folder, {"one": (adapters["plain"], 1.0), "two": (_rank_four(adapters, tmp_path), 1.0)})
    answers = []
    for name in ("first", "second"):
        stock.add_weighted_adapter(["one", "two"], [1.0, 1.0], name, combination_type="dare_linear", density=0.5)
        stock.set_adapter(name)
        answers.append(logits(stock))
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)


def test_the_recipe_names_parents_weights_method_and_code(adapters: dict[str, Path], tmp_path: Path) -> None:
    compose(recipe(tmp_path / "r", adapters=[parent(adapters["plain"], weight=0.5)]), tmp_path / "half")
    compose(
        recipe(tmp_path / "s", adapters=[parent(tmp_path / "half", weight=2.0), parent(adapters["second"])]),
        tmp_path / "out",
    )
    kept = json.loads((tmp_path / "out" / "recipe.json").read_text())["recipe"]
    assert [each["weight"] for each in kept["parents"]] == [2.0, 1.0]
    assert kept["method"] == "weighted"
    assert kept["code"]["compose"] == 1
    inner = kept["parents"][0]["recipe"]["parents"][0]  # taken apart down to what was trained
    assert inner["weight"] == 0.5
    assert len(inner["digest"]) == 64
    assert kept["parents"][1]["recipe"] is None
    assert str(tmp_path) not in json.dumps(kept)


def test_zero_padded_modules_and_one_rank_load_with_stock_peft(
    nf4_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    parents = [parent(adapters["rs"]), parent(adapters["one_layer"])]
    compose(recipe(tmp_path / "r", method="sum", adapters=parents), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 7
    assert settings["use_rslora"] is False
    assert not settings["rank_pattern"]
    assert not settings["alpha_pattern"]
    expected = exact_logits(dynamic(nf4_folder, {name: (adapters[name], 1.0) for name in ("rs", "one_layer")}))
    found = exact_logits(attach_adapter(dense_base(nf4_folder), tmp_path / "out"))
    assert (found - expected).abs().max() <= 1e-6


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_damages_that_stock_peft_loads_silently_are_refused(
    nf4_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Half the tensors, NaN, alpha times 4, another base's name: each loads with stock PEFT, and none composes."""
    whole = adapter_digest(adapters["plain"])

    def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if "layers.0" in name}

    def nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.fill_(torch.nan) if "lora_B" in name else tensor for name, tensor in tensors.items()}

    damages: dict[str, tuple[Callable[[Path], object], str, dict[str, Any]]] = {
        "half": (lambda folder: edit(folder, half), "tensors differ from what this base needs", {}),
        "nan": (lambda folder: edit(folder, nan), "NaN", {}),
        "alpha": (lambda folder: set_config(folder, lora_alpha=24), "another adapter, or changed", {"digest": whole}),
        "name": (lambda folder: set_config(folder, base_model_name_or_path="x/y"), "different bases", {}),
        "rank": (lambda folder: set_config(folder, r=2), "its scale is off", {}),
    }
    for name, (damage, message, own) in damages.items():
        folder = copytree(adapters["plain"], tmp_path / name)
        damage(folder)
        parents = [parent(folder, **own), parent(adapters["second"])]
        asked = recipe(tmp_path / f"r_{name}", method="sum", base=str(nf4_folder), adapters=parents)
        with pytest.raises(ModelError, match=message):
            compose(asked, tmp_path / f"out_{name}")
        assert not (tmp_path / f"out_{name}").exists()
        if name != "rank":
            PeftModel.from_pretrained(load_quantized(nf4_folder, device="cpu"), str(folder))  # negative control


def set_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embeddings"),
        ({"init_lora_weights": "pissa", "target_modules": ["lm_head"]}, "init_lora_weights"),
        ({"init_lora_weights": "olora", "target_modules": ["lm_head"]}, "init_lora_weights"),
    ],
)
def test_what_is_no_sum_of_updates_is_refused_by_name(
    settings: dict[str, Any], message: str, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    folder = write_adapter("odd", **settings)
    with pytest.raises(ModelError, match=message):
        compose(recipe(tmp_path / "r", adapters=[parent(folder)]), tmp_path / "out")


def test_stock_peft_changes_the_base_under_a_pissa_adapter(nf4_folder: Path, tmp_path: Path) -> None:
    """Negative control (peft 0.21.2): loading it takes a part out of a plain layer's weight again."""
    made = get_peft_model(
        load_quantized(nf4_folder, device="cpu"), LoraConfig(init_lora_weights="pissa", target_modules=["lm_head"])
    )
    made.save_pretrained(str(tmp_path / "pissa"))
    clean = load_quantized(nf4_folder, device="cpu")
    before = clean.get_submodule("lm_head").weight.detach().clone()  # pyright: ignore[reportCallIssue]
    PeftModel.from_pretrained(clean, str(tmp_path / "pissa"))
    after: Any = clean.get_submodule("lm_head.base_layer").weight
    assert not torch.allclose(after, before, atol=1e-3)


def test_a_reused_name_is_refused_where_stock_peft_returns_the_old_one(
    nf4_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    twin = copytree(adapters["second"], tmp_path / "plain")
    with pytest.raises(ConfigError, match="two adapters of the recipe are called 'plain'"):
        compose(recipe(tmp_path / "r", adapters=[parent(adapters["plain"]), parent(twin)]), tmp_path / "out")
    stock = dynamic(nf4_folder, {"one": (adapters["plain"], 1.0), "two": (adapters["second"], 1.0)})
    answers = []
    for weights in ([1.0, 1.0], [5.0, -3.0]):  # negative control
        stock.add_weighted_adapter(["one", "two"], weights, "both", combination_type="cat")
        stock.set_adapter("both")
        answers.append(logits(stock))
    assert torch.equal(answers[0], answers[1])


def test_an_adapter_of_another_base_of_equal_shape_is_told_by_its_golden_logits(
    nf4_folder: Path, plain_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    asked = recipe(tmp_path / "r", base=str(nf4_folder), adapters=[parent(adapters["plain"])])
    compose(asked, tmp_path / "own")
    other = copytree(plain_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({n: t + 0.02 * t.roll(1) for n, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    quantize_checkpoint(other, tmp_path / "other_nf4", QuantizeConfig())
    on_other = recipe(tmp_path / "s", base=str(tmp_path / "other_nf4"), adapters=[parent(tmp_path / "own")])
    with pytest.raises(ModelError, match="logits differ"):
        compose(on_other, tmp_path / "out")
    PeftModel.from_pretrained(
        load_quantized(tmp_path / "other_nf4", device="cpu"), tmp_path / "own"
    )  # negative control


def test_mistakes_of_a_recipe_are_shown_together_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("method: summ\nadapters:\n  - {path: a, wieght: 2}\nrank: 0\n")
    with pytest.raises(
        ConfigError, match=r"(?s)3 mistakes.*r.yaml:1: method.*r.yaml:3: adapters.0.wieght.*r.yaml:4"
    ) as caught:
        compose(file, tmp_path / "out")
    assert caught.value.exit_code == 2
