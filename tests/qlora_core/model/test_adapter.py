import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_core.errors import ModelError
from qlora_core.model.adapter import (
    Golden,
    adapter_norms,
    attach_adapter,
    golden_logits,
    read_golden,
    verify_golden,
    write_golden,
)
from qlora_core.model.base import load_quantized

WriteAdapter = Callable[..., Path]
PROMPTS = [[1, 40, 50, 60], [1, 70], [1, 33, 34, 35, 36, 37]]
SOME_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SOME_B = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_attached_adapter_acts_as_plain_peft_would(
    model: PreTrainedModel, nf4_folder: Path, write_adapter: WriteAdapter
) -> None:
    folder = write_adapter()
    alone = golden_logits(model, PROMPTS)
    attached = attach_adapter(model, folder)
    stock = PeftModel.from_pretrained(load_quantized(nf4_folder, device="cpu"), str(folder))
    found, expected = golden_logits(attached, PROMPTS), golden_logits(stock, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found, alone, strict=True))
    assert not attached.training
    assert not any(parameter.requires_grad for parameter in attached.parameters())
    with attached.disable_adapter():
        assert all(torch.equal(a, b) for a, b in zip(golden_logits(attached, PROMPTS), alone, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"rank_pattern": {"down_proj": 2}, "use_rslora": True},
        {"layers_to_transform": [1]},
    ],
    ids=["all-linear", "regex", "rank-pattern", "layers"],
)
def test_what_peft_writes_is_accepted(
    model: PreTrainedModel, write_adapter: WriteAdapter, settings: dict[str, object]
) -> None:
    attach_adapter(model, write_adapter(**settings))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda tensors: tensors.pop(SOME_B), rf"lacks 1 of 8 tensors, the first: {SOME_B}"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "1 tensors that this base has no place for.*extra"),
        (
            lambda tensors: tensors.update({SOME_A: torch.ones(5, 64)}),
            rf"{SOME_A} has shape \[5, 64\].* need \[4, 64\]",
        ),
        (lambda tensors: tensors[SOME_B].fill_(math.nan), f"{SOME_B} holds NaN or infinity"),
    ],
    ids=["missing", "unknown", "misshapen", "nan"],
)
def test_tensors_that_do_not_fit_are_named(
    shared_model: PreTrainedModel,
    write_adapter: WriteAdapter,
    edit: Callable[[dict[str, torch.Tensor]], None],
    complaint: str,
) -> None:
    folder = write_adapter()
    edit_tensors(folder, edit)
    with pytest.raises(ModelError, match=complaint):
        attach_adapter(shared_model, folder)
    assert not hasattr(shared_model, "peft_config")  # refused before anything was put on the base


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "all"}, "'bias': 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights': 'pissa'"),
        ({"target_modules": ["query"]}, "name no module of this base"),
        ({"target_modules": ["embed_tokens"]}, "targets model.embed_tokens, a Embedding"),
        ({"r": 8}, r"has shape \[4, 96\].* need \[8, 96\]"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    shared_model: PreTrainedModel, write_adapter: WriteAdapter, changes: dict[str, object], complaint: str
) -> None:
    folder = write_adapter()
    edit_json(folder / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=complaint):
        attach_adapter(shared_model, folder)


def test_missing_pickled_and_truncated_weights_are_named(
    shared_model: PreTrainedModel, write_adapter: WriteAdapter
) -> None:
    folder = write_adapter()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelError, match="truncated or damaged"):
        attach_adapter(shared_model, folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has adapter_model\.bin, a pickle, which is refused"):
        attach_adapter(shared_model, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        attach_adapter(shared_model, folder)


def test_adapter_of_another_base_is_refused(model: PreTrainedModel, write_adapter: WriteAdapter) -> None:
    folder = write_adapter()
    with pytest.raises(ModelError, match=r"qlora\.json is missing"):
        attach_adapter(model, folder, expected_base_digest="a" * 64)
    (folder / "qlora.json").write_text(json.dumps({"quantized_base_digest": "b" * 64}))
    with pytest.raises(ModelError, match=r"trained on base bbbb.*, the base in use is aaaa"):
        attach_adapter(model, folder, expected_base_digest="a" * 64)
    attach_adapter(model, folder, expected_base_digest="b" * 64)


def test_norms_tell_an_untrained_adapter(write_adapter: WriteAdapter) -> None:
    folder = write_adapter()
    norms = adapter_norms(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = math.sqrt(sum(t.double().square().sum().item() for name, t in tensors.items() if "lora_B" in name))
    assert norms.b == pytest.approx(expected)
    edit_tensors(folder, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    assert adapter_norms(folder).b == 0
    assert adapter_norms(folder).a == norms.a > 0


def test_golden_logits_are_the_last_positions(shared_model: PreTrainedModel) -> None:
    found = golden_logits(shared_model, PROMPTS)
    for prompt, logits in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            expected = shared_model(torch.tensor([prompt]), use_cache=False).logits[0, len(prompt) - 1]
        assert logits.dtype == torch.float32
        assert torch.equal(logits, expected)


def test_golden_round_trip_and_tampering(
    model: PreTrainedModel, write_adapter: WriteAdapter, shared_model: PreTrainedModel
) -> None:
    folder = write_adapter()
    attached = attach_adapter(model, folder)
    write_golden(folder, Golden(PROMPTS, golden_logits(attached, PROMPTS)))
    assert read_golden(folder).prompts == PROMPTS
    assert verify_golden(attached, folder, atol=0.0) == 0.0
    with pytest.raises(ModelError, match=r"golden prompt 0 .* logits differ by"):
        verify_golden(shared_model, folder, atol=1e-4)  # the base without the adapter
    content = load_file(folder / "golden.safetensors")
    content["logits_2"][7] = math.nan
    save_file(content, folder / "golden.safetensors")
    with pytest.raises(ModelError, match=r"golden prompt 2 .* differ by nan"):
        verify_golden(attached, folder, atol=1e-4)
    del content["logits_2"]
    save_file(content, folder / "golden.safetensors")
    with pytest.raises(ModelError, match="do not match"):
        read_golden(folder)
    (folder / "golden.safetensors").unlink()
    with pytest.raises(ModelError, match=r"golden\.safetensors is missing"):
        read_golden(folder)


def test_golden_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="at least one"):
        write_golden(tmp_path, Golden([], []))
