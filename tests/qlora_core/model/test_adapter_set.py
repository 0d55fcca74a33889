import json
import math
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_core.errors import ModelError
from qlora_core.model.adapter_set import AdapterSet, NamedAdapter, attached_adapters
from qlora_core.model.base import load_quantized
from qlora_core.quantization.dequantize import dequantize_exact

WriteAdapter = Callable[..., Path]
SOME_B = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
TOKENS = torch.tensor([[1, 40, 50, 60, 9], [1, 70, 71, 72, 8], [1, 33, 34, 35, 36], [1, 5, 6, 7, 50]])


@pytest.fixture
def named(unlike_adapters: dict[str, Path], tmp_path: Path) -> list[NamedAdapter]:
    """Copies: a test may edit them."""
    return [NamedAdapter(name, copytree(folder, tmp_path / name)) for name, folder in unlike_adapters.items()]


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model: PreTrainedModel | PeftModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def test_each_row_is_as_with_its_adapter_alone_under_peft(
    model: PreTrainedModel, nf4_folder: Path, named: list[NamedAdapter]
) -> None:
    rows = ["rs", None, "wide", "plain", "one_layer", "patterns", "wide"]
    tokens = torch.cat([TOKENS, TOKENS])[: len(rows)]
    base = logits(model, tokens)
    with attached_adapters(model, named) as adapters, adapters.rows(rows):
        mixed = logits(model, tokens)
    for place, name in enumerate(rows):
        if name is None:
            assert torch.equal(mixed[place], base[place])
            continue
        stock = PeftModel.from_pretrained(load_quantized(nf4_folder, device="cpu"), str(dict(named)[name]))
        alone = logits(stock, tokens[place : place + 1])[0]
        torch.testing.assert_close(mixed[place], alone, atol=2e-5, rtol=1e-5)
        assert (alone - base[place]).abs().max() > 1e-2  # the adapter does something


def test_a_module_gives_what_the_formula_gives_in_float64(model: PreTrainedModel, named: list[NamedAdapter]) -> None:
    """alpha / r of `patterns` is 7 / 2 here, by its own patterns; the base's share is dequantized in float32."""
    place = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(place)
    assert isinstance(layer, Linear4bit)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x = torch.randn(3, 4, 96)
    tensors = load_file(dict(named)["patterns"] / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{place}.lora_{factor}.weight"].double() for factor in "AB")
    weight = dequantize_exact(layer.weight.data, layer.weight.quant_state, torch.float32).double()  # pyright: ignore[reportAttributeAccessIssue]
    expected = x.double() @ weight.T
    expected[1] += 7 / 2 * x[1].double() @ a.T @ b.T
    with (
        attached_adapters(model, named) as adapters,
        adapters.rows([None, "patterns", "rs"]),
    ):  # rs is not on this layer
        torch.testing.assert_close(layer(x).double(), expected, atol=2e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours_adapters(
    shared_model: PreTrainedModel, named: list[NamedAdapter]
) -> None:
    """One neighbour's factors are finite and its products are not: what it makes of other rows must not reach them."""
    edit_tensors(named[2].folder, lambda tensors: [t.mul_(1e30) for name, t in tensors.items() if "lora_A" in name])
    edit_tensors(named[2].folder, lambda tensors: [t.mul_(1e20) for name, t in tensors.items() if "lora_B" in name])
    with attached_adapters(shared_model, named) as adapters:
        with adapters.rows(["plain", "plain", "plain", None]):
            among_its_own = logits(shared_model)
        with adapters.rows(["plain", "wide", "plain", None]):
            beside_a_wild_one = logits(shared_model)
    assert not beside_a_wild_one[1].isfinite().any()
    for place in (0, 2, 3):
        torch.testing.assert_close(beside_a_wild_one[place], among_its_own[place], atol=1e-5, rtol=1e-5)


def test_the_base_is_as_it_was_outside_rows_and_afterwards(model: PreTrainedModel, named: list[NamedAdapter]) -> None:
    before = logits(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    weights = {name: (value.data_ptr(), value._version) for name, value in model.named_parameters()}
    with pytest.raises(RuntimeError, match="in the middle"), attached_adapters(model, named) as adapters:
        assert torch.equal(logits(model), before)
        with adapters.rows(["rs"] * 4):
            assert not torch.equal(logits(model), before)
            raise RuntimeError("in the middle")
    assert torch.equal(logits(model), before)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: (value.data_ptr(), value._version) for name, value in model.named_parameters()} == weights
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_that_are_kept_keep_their_adapters(shared_model: PreTrainedModel, named: list[NamedAdapter]) -> None:
    with attached_adapters(shared_model, named) as adapters:
        with adapters.rows(["rs", "plain", None, "wide"]):
            whole = logits(shared_model)
            adapters.keep([1, 3])
            rest = logits(shared_model, TOKENS[[1, 3]])
        with pytest.raises(ModelError, match="only inside a rows block"):
            adapters.keep([0])
    torch.testing.assert_close(rest, whole[[1, 3]], atol=1e-5, rtol=1e-5)


def test_adapters_that_come_and_go_leave_the_others_as_in_a_set_of_their_own(
    model: PreTrainedModel, named: list[NamedAdapter]
) -> None:
    folders = dict(named)
    rows = ["plain", "wide", None, "one_layer"]
    with attached_adapters(model, [each for each in named if each.name in rows]) as fresh, fresh.rows(rows):
        expected = logits(model)
    with attached_adapters(model, named[:2]) as adapters:  # plain, rs
        for name in ("wide", "patterns", "one_layer"):
            adapters.add(NamedAdapter(name, folders[name]))
        adapters.drop("rs")
        adapters.drop("patterns")
        assert set(adapters.names) == {"plain", "wide", "one_layer"}
        with adapters.rows(rows):
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
            for change in (lambda: adapters.drop("plain"), lambda: adapters.add(named[1])):
                with pytest.raises(ModelError, match="between batches"):
                    change()
        with pytest.raises(ModelError, match="no adapter is named 'rs'"), adapters.rows(["rs"] * 4):
            pass
        for name in adapters.names:
            adapters.drop(name)
        assert not any(module._forward_hooks for module in model.modules())  # the base's own again
        adapters.add(NamedAdapter("again", folders["plain"]))
        with adapters.rows(["again", None, None, None]):
            torch.testing.assert_close(logits(model)[0], expected[0], atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_refused_leaves_the_set_as_it_was(
    shared_model: PreTrainedModel, named: list[NamedAdapter], write_adapter: WriteAdapter
) -> None:
    bad = NamedAdapter("bad", write_adapter("bad"))
    edit_tensors(bad.folder, lambda tensors: tensors[SOME_B].fill_(math.nan))
    with attached_adapters(shared_model, named[:2]) as adapters:
        with adapters.rows(["rs"] * 4):
            before = logits(shared_model)
        with pytest.raises(ModelError, match="holds NaN"):
            adapters.add(bad)
        with pytest.raises(ModelError, match="'rs' is given twice"):
            adapters.add(named[1])
        assert adapters.names == ("plain", "rs")
        with adapters.rows(["rs"] * 4):
            assert torch.equal(logits(shared_model), before)


def test_names_that_cannot_be_are_refused(shared_model: PreTrainedModel, named: list[NamedAdapter]) -> None:
    with pytest.raises(ModelError, match="no adapter was given"), attached_adapters(shared_model, []):
        pass
    twice = [named[0], NamedAdapter("plain", named[1].folder)]
    with pytest.raises(ModelError, match="'plain' is given twice"), attached_adapters(shared_model, twice):
        pass
    unknown = pytest.raises(ModelError, match="no adapter is named 'wide' here; there are plain, rs")
    with attached_adapters(shared_model, named[:2]) as adapters, unknown, adapters.rows([None, "wide"]):
        pass


@pytest.mark.parametrize("rows", [["plain"], [None] * 5])
def test_batch_of_other_rows_than_were_named_is_refused(
    shared_model: PreTrainedModel, named: list[NamedAdapter], rows: list[str | None]
) -> None:
    refused = pytest.raises(ModelError, match=r"was given \[4, 5, 64\], not \[\d, tokens, 64\].*cannot be told apart")
    with attached_adapters(shared_model, named) as adapters, adapters.rows(rows), refused:
        logits(shared_model)


def test_layer_that_takes_rows_as_one_list_of_tokens_is_refused(
    shared_model: PreTrainedModel, named: list[NamedAdapter]
) -> None:
    """As routers and experts do: which token is whose is not to be seen there."""
    refused = pytest.raises(ModelError, match="cannot be told apart")
    with attached_adapters(shared_model, named) as adapters, adapters.rows(["plain"] * 4), refused:
        shared_model.get_submodule("model.layers.0.self_attn.q_proj")(torch.ones(4, 64))


@pytest.mark.parametrize(
    ("break_folder", "complaint"),
    [
        (lambda folder: edit_tensors(folder, lambda tensors: tensors[SOME_B].fill_(math.nan)), "holds NaN or infinity"),
        (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(SOME_B)), "lacks 1 of 8 tensors"),
        (
            lambda folder: edit_json(folder / "adapter_config.json", lora_alpha=1e40),
            r"lora_alpha / r is beyond float32",
        ),
        (lambda folder: edit_json(folder / "qlora.json", quantized_base_digest="b" * 64), r"trained on base bbbb"),
    ],
    ids=["nan", "missing", "scale", "other-base"],
)
def test_one_bad_folder_is_refused_and_nothing_stays_on_the_base(
    shared_model: PreTrainedModel,
    write_adapter: WriteAdapter,
    break_folder: Callable[[Path], None],
    complaint: str,
) -> None:
    named = [NamedAdapter(name, write_adapter(name)) for name in ("good", "bad")]
    for _, folder in named:
        (folder / "qlora.json").write_text(json.dumps({"quantized_base_digest": "a" * 64}))
    with attached_adapters(shared_model, named, expected_base_digest="a" * 64) as adapters:
        assert adapters.names == ("good", "bad")
    break_folder(named[1].folder)
    attempt = attached_adapters(shared_model, named, expected_base_digest="a" * 64)
    with pytest.raises(ModelError, match=complaint), attempt:
        pass
    assert not any(module._forward_hooks for module in shared_model.modules())


def test_base_with_pefts_own_layers_is_refused(model: PreTrainedModel, named: list[NamedAdapter]) -> None:
    before = logits(model)
    stock = PeftModel.from_pretrained(model, str(named[0].folder))
    with pytest.raises(ModelError, match=r"unload\(\)"), attached_adapters(model, named[1:]):
        pass
    stock.unload()
    with attached_adapters(model, named[1:]):
        assert torch.equal(logits(model), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_bfloat16_on_a_gpu_is_as_peft_alone(nf4_folder: Path, named: list[NamedAdapter]) -> None:
    tokens = TOKENS.to("cuda")
    base = load_quantized(nf4_folder, precision="bfloat16", device="cuda")
    rows: list[str | None] = ["rs", None, "wide", "patterns"]
    with attached_adapters(base, named) as adapters, adapters.rows(rows):
        assert isinstance(adapters, AdapterSet)
        mixed = logits(base, tokens)
    for place, name in enumerate(rows):
        alone = load_quantized(nf4_folder, precision="bfloat16", device="cuda")
        stock = alone if name is None else PeftModel.from_pretrained(alone, str(dict(named)[name]))
        difference = (mixed[place] - logits(stock, tokens[place : place + 1])[0]).float()
        assert difference.norm() / mixed[place].float().norm() < 0.02
