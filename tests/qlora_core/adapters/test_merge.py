import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core.adapters.merge import MergeRequest, merge
from qlora_core.config.merge import MergeConfig
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import attach_adapter, verify_golden
from qlora_core.model.base import load_any, load_quantized
from qlora_core.model.perplexity import document_losses, encode_documents, score_text_file
from qlora_core.quantization.checkpoint import read_tensors


def request(world: Any, adapter: str, out: Path, target: str, **own: Any) -> MergeRequest:
    texts = {"text": world.test, "calibration": world.calibration}
    places = {"base": world.nf4, "original": world.plain, **texts, **own}
    return MergeRequest(world.adapters[adapter], out=out, target=target, **places)


def gain_of(world: Any, adapter: str) -> tuple[float, float]:
    """Held-out loss of the base, and of the adapter on it, by another path than the certificate's."""
    base = score_text_file(world.nf4, world.test).loss
    return base, score_text_file(world.nf4, world.test, world.adapters[adapter]).loss


@pytest.mark.parametrize("adapter", ["mid", "small"])
def test_a_16_bit_merge_keeps_the_gain_and_loads_with_stock_transformers(
    adapter: str, world: Any, tmp_path: Path
) -> None:
    result = merge(request(world, adapter, tmp_path / "out", "16bit"), MergeConfig())
    assert result["gain_retained"] >= 0.999
    assert result["kl"] < 1e-7
    assert result["dtype"] == "float16"
    base, dynamic = gain_of(world, adapter)
    merged = score_text_file(tmp_path / "out", world.test).loss
    assert (base - merged) / (base - dynamic) == pytest.approx(result["gain_retained"], abs=2e-3)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert verify_golden(stock, tmp_path / "out", atol=1e-5) <= 1e-5
    stored = {tensor.dtype for name, tensor in read_tensors(tmp_path / "out").items() if "_proj" in name}
    assert stored == {"F16"}


def test_an_nf4_merge_tries_all_ways_and_takes_the_nearest_that_passes(world: Any, tmp_path: Path) -> None:
    """In the order that is known: calibration brings the dequantized base nearer, the original base is farther."""
    result = merge(request(world, "mid", tmp_path / "out", "nf4"), MergeConfig())
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    tried = {entry["name"]: entry for entry in certificate["candidates"]}
    assert list(tried) == ["dequantized-rtn", "dequantized-calibrated", "original-rtn", "original-calibrated"]
    assert tried["dequantized-calibrated"]["kl"] < tried["dequantized-rtn"]["kl"] / 1.5
    assert tried["dequantized-calibrated"]["kl"] < tried["original-calibrated"]["kl"] < tried["original-rtn"]["kl"]
    assert result["chosen"] == certificate["chosen"] == "dequantized-calibrated"
    assert result["gain_retained"] >= 0.97
    assert 0.95 <= result["projection"] <= 1.05
    assert certificate["verdict"] == "pass"
    # a prediction is what reading the written file then finds
    assert certificate["predicted"]["dequantized"]["projection"] == pytest.approx(
        tried["dequantized-rtn"]["projection"], abs=1e-6
    )
    layer = tried["original-rtn"]["layers"][0]
    assert 0.05 < layer["quantization_over_delta"] * layer["delta_over_weight"] < 0.15  # NF4's error, 9 % of |W|
    base, dynamic = gain_of(world, "mid")
    merged = score_text_file(tmp_path / "out", world.test).loss
    assert (base - merged) / (base - dynamic) == pytest.approx(result["gain_retained"], abs=2e-3)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"}).eval()
    assert verify_golden(stock, tmp_path / "out", atol=1e-4) <= 1e-4


def test_a_small_delta_is_refused_with_the_figure_where_stock_peft_loses_it_silently(
    world: Any, tmp_path: Path
) -> None:
    config = MergeConfig(min_predicted_projection=-1, candidates=["dequantized-rtn", "original-rtn"])
    with pytest.raises(ModelError, match=r"gain retained 0\.\d+ is under 0\.97") as caught:
        merge(request(world, "small", tmp_path / "out", "nf4"), config)
    assert not (tmp_path / "out").exists()
    certificate = json.loads((tmp_path / "out.refused.json").read_text())
    assert certificate["verdict"] == "fail"
    rtn, original = certificate["candidates"]
    assert rtn["gain_retained"] < 0.15
    assert rtn["kl"] < 1e-3  # KL alone would have passed it
    assert rtn["projection"] < 0.1
    assert original["gain_retained"] > 0.7
    assert f"{rtn['gain_retained']:.4f}" in str(caught.value)
    # negative control: peft merges without a word, and the tune is gone
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.nf4, device_map={"": "cpu"}), str(world.adapters["small"])
    ).merge_and_unload()
    documents = encode_documents(AutoTokenizer.from_pretrained(world.nf4), world.test.read_text())
    losses = document_losses(merged.eval(), documents)
    loss = sum(nats for nats, _ in losses) / sum(count for _, count in losses)
    base, dynamic = gain_of(world, "small")
    assert (base - loss) / (base - dynamic) == pytest.approx(rtn["gain_retained"], abs=0.1)


def test_the_dead_zone_is_predicted_before_anything_is_written(world: Any, tmp_path: Path) -> None:
    config = MergeConfig(candidates=["dequantized-rtn"])
    with pytest.raises(ModelError, match=r"not written: the grid would leave 0\.0"):
        merge(request(world, "small", tmp_path / "out", "nf4"), config)
    predicted = json.loads((tmp_path / "out.refused.json").read_text())["predicted"]["dequantized"]
    assert predicted["projection"] < 0.1
    assert all(layer["codes_changed"] < 0.02 for layer in predicted["layers"])


def test_an_adapter_that_does_nothing_merges_to_the_base(world: Any, tmp_path: Path) -> None:
    idle = copytree(world.adapters["small"], tmp_path / "idle")
    tensors = load_file(idle / "adapter_model.safetensors")
    zeroed = {name: tensor.zero_() if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(zeroed, idle / "adapter_model.safetensors")
    (idle / "golden.json").unlink()
    asked = MergeRequest(idle, world.nf4, tmp_path / "out", "nf4", text=world.test)
    result = merge(asked, MergeConfig(candidates=["dequantized-rtn"]))
    assert result["kl"] < 1e-9
    assert result["top1_agreement"] == 1
    assert result["gain_retained"] is None
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(world.nf4 / "model.safetensors").items():
        assert torch.equal(merged[name], tensor), name


def test_without_a_text_the_adapters_own_samples_measure_it(world: Any, tmp_path: Path) -> None:
    config = MergeConfig(calibration_tokens=64, measured_tokens=1024)
    result = merge(request(world, "mid", tmp_path / "out", "16bit", text=None, calibration=None), config)
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert "samples of the adapter" in certificate["measured_on"]["origin"]
    assert certificate["measured_on"]["tokens"] >= 1024
    assert result["gain"] > 0.05  # KL(adapter || base)
    assert result["gain_retained"] >= 0.999


def test_float16_that_overflows_gives_bfloat16(world: Any, tmp_path: Path) -> None:
    wild = copytree(world.nf4, tmp_path / "wild")
    tensors = load_file(wild / "model.safetensors")
    tensors["model.norm.weight"][0] = 70000.0
    tensors["lm_head.weight"][:, 0] /= 70000.0
    save_file(tensors, wild / "model.safetensors", {"format": "pt"})
    adapter = copytree(world.adapters["mid"], tmp_path / "mid")
    (adapter / "golden.json").unlink()
    asked = MergeRequest(adapter, wild, tmp_path / "out", "16bit", text=world.test)
    loose = MergeConfig(min_gain_16bit=0, max_kl_16bit=10, min_top1_16bit=0, min_projection=-9, max_projection=9)
    assert merge(asked, loose)["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original": "other"}, "does not quantize to the base's codes"),
        ({"base": "plain"}, "is no 4-bit checkpoint"),
        ({"target": "8bit"}, "choose 16bit or nf4"),
        ({"text": "empty"}, "no token to predict"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(
    change: dict[str, str], message: str, world: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    places = {"other": tmp_path / "other", "plain": world.plain, "empty": tmp_path / "empty.txt"}
    if "original" in change:
        copytree(world.plain, tmp_path / "other")
        tensors = load_file(tmp_path / "other" / "model.safetensors")
        save_file(
            {n: t + 0.1 * t.roll(1) for n, t in tensors.items()},
            tmp_path / "other" / "model.safetensors",
            {"format": "pt"},
        )
    values = {key: places.get(value, value) for key, value in change.items()}
    asked = MergeRequest(**{**request(world, "mid", tmp_path / "out", "nf4").__dict__, **values})
    with pytest.raises((ModelError, ConfigError), match=message):
        merge(asked, MergeConfig(candidates=["original-rtn"]))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".merge-*"))


def test_a_merge_into_the_wrong_base_is_refused_where_its_shapes_alone_pass(world: Any, tmp_path: Path) -> None:
    other = copytree(world.nf4, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 0.05 * tensors["model.embed_tokens.weight"].roll(1)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="logits differ"):
        merge(request(world, "mid", tmp_path / "out", "16bit", base=other), MergeConfig())
    attach_adapter(load_quantized(other, device="cpu"), world.adapters["mid"])  # negative control: shapes fit
    load_any(other)
