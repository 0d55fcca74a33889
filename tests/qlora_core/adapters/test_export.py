import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_core.adapters.adapter_folder import AdapterFolder
from qlora_core.adapters.export import export_canonical, portability
from qlora_core.adapters.low_rank import LowRank
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import verify_golden
from qlora_core.model.base import load_quantized

TOKENS = torch.tensor([[1, 40, 50, 60, 9], [1, 70, 71, 72, 8]])


def by_alpha_over_r_alone(folder: Path, module: str) -> torch.Tensor:
    """What a reader computes that knows `r` and `lora_alpha` and nothing else, as SGLang and vLLM do."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return settings["lora_alpha"] / settings["r"] * b @ a


@pytest.mark.parametrize("name", ["plain", "rs", "patterns", "one_layer"])
def test_stock_peft_and_readers_of_alpha_over_r_compute_what_was_trained(
    name: str, nf4_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    report = export_canonical(adapters[name], tmp_path / "out", base=nf4_folder)
    assert 0 <= report["largest_logit_difference"] <= 1e-5
    answers = []
    for folder in (adapters[name], tmp_path / "out"):
        model = PeftModel.from_pretrained(load_quantized(nf4_folder, device="cpu"), str(folder)).eval()
        with torch.inference_mode():
            answers.append(model(input_ids=TOKENS).logits)
    torch.testing.assert_close(answers[0], answers[1], atol=3e-6, rtol=0)
    exported = PeftModel.from_pretrained(load_quantized(nf4_folder, device="cpu"), str(tmp_path / "out")).eval()
    assert verify_golden(exported, tmp_path / "out", atol=1e-5) <= 1e-5
    stock: Any = PeftModel.from_pretrained(load_quantized(nf4_folder, device="cpu"), str(adapters[name]))
    module = "model.layers.1.self_attn.q_proj"
    trained = stock.base_model.model.get_submodule(module).get_delta_weight("default").double()
    torch.testing.assert_close(by_alpha_over_r_alone(tmp_path / "out", module), trained, atol=1e-6, rtol=1e-5)
    assert report["readers"]["vllm"]["ok"]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["use_rslora"], settings["init_lora_weights"]) == (
        settings["lora_alpha"],
        False,
        True,
    )


@pytest.mark.parametrize(
    ("name", "module"), [("rs", "layers.0.self_attn.v_proj"), ("patterns", "layers.1.mlp.down_proj")]
)
def test_readers_of_alpha_over_r_get_the_source_wrong(
    name: str, module: str, nf4_folder: Path, adapters: dict[str, Path]
) -> None:
    """Negative control: rsLoRA and patterns vanish, and nobody is told."""
    stock: Any = PeftModel.from_pretrained(load_quantized(nf4_folder, device="cpu"), str(adapters[name]))
    trained = stock.base_model.model.get_submodule(f"model.{module}").get_delta_weight("default").double()
    wrong = by_alpha_over_r_alone(adapters[name], f"model.{module}")
    assert (wrong - trained).norm() > 0.4 * trained.norm()


def test_the_report_says_who_can_serve_it() -> None:
    narrow = portability(8, ("model.layers.0.mlp.up_proj",), 1.0)
    assert {name: reader["ok"] for name, reader in narrow.items()} == {
        "peft": True, "vllm": True, "sglang": True, "gguf": False
    }  # fmt: skip
    assert narrow["vllm"]["needs"] == []
    assert portability(40, ("a.up_proj",), 1.0)["vllm"]["needs"] == ["--max-lora-rank 64"]
    assert not portability(600, ("a.up_proj",), 1.0)["vllm"]["ok"]
    assert not portability(8, ("lm_head",), 1.0)["sglang"]["ok"]
    assert "float16" in portability(8, ("a.up_proj",), 1e5)["vllm"]["why"][0]


def test_ranks_are_padded_on_demand_and_never_cut(adapters: dict[str, Path], tmp_path: Path) -> None:
    report = export_canonical(adapters["one_layer"], tmp_path / "out", rank=16)
    assert report["rank"] == 16
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {16}
    with pytest.raises(ConfigError, match="under the adapter's 8"):
        export_canonical(adapters["second"], tmp_path / "less", rank=4)
    with pytest.raises(ConfigError, match="not empty"):
        export_canonical(adapters["second"], tmp_path / "out")


def test_what_readers_would_drop_is_refused_by_name(
    write_adapter: Any, adapters: dict[str, Path], tmp_path: Path
) -> None:
    for name, message in (("dora", "DoRA"), ("nan", "NaN"), ("child", "on top of other")):
        folder = write_adapter(name, use_dora=name == "dora")
        if name == "nan":
            tensors = load_file(folder / "adapter_model.safetensors")
            save_file({n: t.fill_(torch.nan) for n, t in tensors.items()}, folder / "adapter_model.safetensors")
        if name == "child":
            (folder / "qlora.json").write_text(json.dumps({"parent_adapter_digests": ["a" * 64]}))
        with pytest.raises(ModelError, match=message):
            export_canonical(folder, tmp_path / f"out_{name}")
        assert not (tmp_path / f"out_{name}").exists()
        assert not (tmp_path / f".out_{name}.staging").exists()


def test_an_export_that_answers_otherwise_is_refused(
    nf4_folder: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is put where a wrong scale would come from: 1 % too much in every B."""
    factors = AdapterFolder.factors

    def too_large(adapter: AdapterFolder, module: str) -> LowRank:
        right = factors(adapter, module)
        return LowRank(right.a_ri, right.b_or * 1.01)

    monkeypatch.setattr(AdapterFolder, "factors", too_large)
    with pytest.raises(ModelError, match="answers other than"):
        export_canonical(adapters["plain"], tmp_path / "out", base=nf4_folder)
    assert not (tmp_path / "out").exists()


def test_golden_logits_travel_without_a_base(nf4_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    export_canonical(adapters["plain"], tmp_path / "one", base=nf4_folder)
    export_canonical(copytree(tmp_path / "one", tmp_path / "copy"), tmp_path / "two")
    assert (tmp_path / "two" / "golden.safetensors").read_bytes() == (
        tmp_path / "one" / "golden.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "two" / "portability.json").read_text())["source_digest"] != "null"
