from pathlib import Path
from shutil import copytree
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_core.adapters.bisect import bisect_regression
from qlora_core.adapters.export import export_canonical
from qlora_core.adapters.inspect import diff_adapters, inspect_adapter


def deltas(folder: Path, scale: float) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * (tensors[name.replace("lora_A", "lora_B")].double() @ tensor.double())
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def test_an_adapter_is_told_as_its_deltas_are(adapters: dict[str, Path]) -> None:
    found = inspect_adapter(adapters["second"])
    dense = deltas(adapters["second"], 16 / 8)
    whole = sum(delta.square().sum() for delta in dense.values())
    assert isinstance(whole, torch.Tensor)
    assert found["norm"] == pytest.approx(whole.sqrt().item(), rel=1e-6)
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    assert found["layers"] == sorted(found["layers"], key=lambda layer: -layer["share"])
    for layer in found["layers"]:
        values = torch.linalg.svdvals(dense[layer["module"]])[:8]
        shares = values / values.sum()
        assert layer["effective_rank"] == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-5)
        assert layer["largest_singular_value"] == pytest.approx(values[0].item(), rel=1e-5)
        energy = values.square().cumsum(0) / values.square().sum()
        assert energy[layer["rank_99"] - 1] >= 0.99
        assert layer["rank_99"] == 1 or energy[layer["rank_99"] - 2] < 0.99


def test_padding_changes_no_rank_in_use_and_no_difference(adapters: dict[str, Path], tmp_path: Path) -> None:
    export_canonical(adapters["patterns"], tmp_path / "padded", rank=16)
    before, after = inspect_adapter(adapters["patterns"]), inspect_adapter(tmp_path / "padded")
    assert after["rank"] == 16
    for one, two in zip(before["layers"], after["layers"], strict=True):
        assert two["effective_rank"] == pytest.approx(one["effective_rank"], rel=1e-4)
        assert two["rank_99"] == one["rank_99"]
    same = diff_adapters(adapters["patterns"], tmp_path / "padded")
    assert same["cosine"] == pytest.approx(1)
    assert same["relative_difference"] < 1e-6


def test_a_difference_is_that_of_the_deltas(adapters: dict[str, Path]) -> None:
    found = diff_adapters(adapters["plain"], adapters["second"])
    one, two = deltas(adapters["plain"], 6 / 4), deltas(adapters["second"], 16 / 8)
    square = sum((one[name] - two[name]).square().sum().item() for name in one)
    whole = sum(one[name].square().sum().item() for name in one)
    assert found["relative_difference"] == pytest.approx((square / whole) ** 0.5, rel=1e-5)
    assert not found["equal"]
    odd = diff_adapters(adapters["plain"], adapters["rs"])
    assert any("down_proj" in module for module in odd["only_first"])
    assert any("v_proj" in module for module in odd["only_second"])


def test_bisect_finds_the_adapter_the_block_and_the_module(world: Any, small_world: ModuleType, tmp_path: Path) -> None:
    """One of two adapters has one module spoilt; the search is not told which."""
    good = world.adapters["mid"]
    bad = copytree(world.adapters["small"], tmp_path / "bad")
    file = bad / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors[name] = 3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, file)
    (bad / "golden.json").unlink()
    found = bisect_regression(world.nf4, [good, bad], world.test)
    assert found["regression"]["low"] > 0
    assert found["culprit"] == {
        "adapter": str(bad), "block": "model.layers.1", "module": "model.layers.1.mlp.down_proj"
    }  # fmt: skip
    given = {entry["adapter"]: entry for entry in found["by_adapter"]}
    assert given[str(bad)]["low"] > 0
    assert given[str(good)]["high"] < given[str(bad)]["low"]
    none = bisect_regression(world.nf4, [good], world.test)
    assert none["culprit"] is None
    assert none["regression"]["high"] < 0
