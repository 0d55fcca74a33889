"""The adapter on the base: its seed, its targets, its modes, and that nothing of it stays behind."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.training.batches import collate
from qlora_core.training.lora import attached_adapter
from qlora_core.training.loss import accumulate_gradients
from qlora_core.training.trial import Trial

CPU = torch.device("cpu")


def _base_bytes(base: PreTrainedModel) -> str:
    """SHA-256 over all tensors of the base: parameters, buffers, and the quantization constants beside the codes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_equal_seeds_give_equal_adapters_whatever_ran_before(
    base: PreTrainedModel, trial: Callable[..., Trial]
) -> None:
    digests = []
    for seed, noise in ((1, 0), (1, 17), (2, 0)):
        torch.manual_seed(noise)
        torch.rand(noise)
        with attached_adapter(base, trial(seed=seed).params) as adapter:
            digests.append(adapter.digest())
    assert digests[0] == digests[1] != digests[2]


def test_attaching_leaves_the_callers_generator_alone(base: PreTrainedModel, trial: Callable[..., Trial]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with attached_adapter(base, trial().params):
        pass
    assert torch.equal(torch.rand(4), expected)


def test_all_linear_covers_every_4bit_layer_and_not_the_head(
    base: PreTrainedModel, trial: Callable[..., Trial]
) -> None:
    quantized = {name for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) == 14
    with attached_adapter(base, trial().params) as adapter:
        adapted = {name for name, module in adapter.base.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == quantized


def test_adapter_is_float32_and_alone_trainable(base: PreTrainedModel, trial: Callable[..., Trial]) -> None:
    with attached_adapter(base, trial(lora_rank=3).params) as adapter:
        trainable = {name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, _ in adapter.model.named_parameters() if ".lora_" in name}
        assert {parameter.dtype for parameter in adapter.parameters.values()} == {torch.float32}
        assert adapter.parameters["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (32, 3)


def test_target_modules_that_match_nothing_are_refused_with_what_exists(
    base: PreTrainedModel, trial: Callable[..., Trial]
) -> None:
    refused = {"query": r"\['query'\] match no linear layer.* k_proj, .*v_proj", "lm_head": "lm_head"}
    for name, message in refused.items():
        params = trial(target_modules=["q_proj", name]).params
        with pytest.raises(TrainingError, match=message), attached_adapter(base, params):
            pass
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def test_named_targets_get_an_adapter_and_nothing_else(base: PreTrainedModel, trial: Callable[..., Trial]) -> None:
    with attached_adapter(base, trial(target_modules=["self_attn.q_proj", "down_proj"]).params) as adapter:
        adapted = {name.split(".")[-1] for name, m in adapter.base.named_modules() if isinstance(m, LoraLayer)}
    assert adapted == {"q_proj", "down_proj"}


def test_base_is_the_same_to_the_byte_after_training_an_adapter(
    base: PreTrainedModel, trial: Callable[..., Trial], rows: Callable[..., list[TokenRow]]
) -> None:
    before, modules = _base_bytes(base), [(name, id(module)) for name, module in base.named_modules()]
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        logits = base(input_ids=ids).logits
    with attached_adapter(base, trial(gradient_checkpointing=True).params) as adapter:
        adapter.train_mode(gradient_checkpointing=True)
        batch = collate(rows(3), CPU)
        for parameter in adapter.parameters.values():
            parameter.data += 0.1
        accumulate_gradients(base, [batch], batch.trained_tokens)
    assert _base_bytes(base) == before
    assert [(name, id(module)) for name, module in base.named_modules()] == modules
    assert not any(module.training for module in base.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.parameters())
    assert not base.is_activation_checkpointing
    assert not hasattr(base, "peft_config")
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, logits)


def test_a_base_changed_under_the_adapter_is_noticed(base: PreTrainedModel, trial: Callable[..., Trial]) -> None:
    weight, params = base.get_parameter("model.embed_tokens.weight"), trial().params
    with pytest.raises(TrainingError, match="moved or rewritten"), attached_adapter(base, params), torch.no_grad():
        weight.add_(1)


def test_only_lora_dropout_is_on_while_training(base: PreTrainedModel, trial: Callable[..., Trial]) -> None:
    with attached_adapter(base, trial().params) as adapter:
        adapter.train_mode(gradient_checkpointing=False)
        on = [name for name, module in adapter.model.named_modules() if module.training]
        assert on and all("lora_dropout" in name for name in on)
        adapter.eval_mode()
        assert not any(module.training for module in adapter.model.modules())


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(
    base: PreTrainedModel, trial: Callable[..., Trial], rows: Callable[..., list[TokenRow]]
) -> None:
    batch = collate(rows(4), CPU)
    found = {}
    for checkpointing in (False, True):
        with attached_adapter(base, trial(lora_dropout=0.3).params) as adapter:
            for name, parameter in adapter.parameters.items():
                if "lora_B" in name:
                    torch.nn.init.constant_(parameter, 0.01)
            adapter.train_mode(gradient_checkpointing=checkpointing)
            seen: list[str] = []
            norm = base.get_submodule("model.layers.0.input_layernorm")
            hook = norm.register_forward_hook(lambda *_, seen=seen: seen.append("forward"))
            torch.manual_seed(9)
            sums = accumulate_gradients(base, [batch], batch.trained_tokens)
            hook.remove()
            gradients = {name: p.grad.clone() for name, p in adapter.parameters.items() if p.grad is not None}
        found[checkpointing] = (sums, gradients, len(seen))
    (sums, gradients, calls), (sums_again, gradients_again, calls_again) = found[False], found[True]
    assert (calls, calls_again) == (1, 2)  # twice: forward, and again while going backward
    assert sums == sums_again
    assert gradients.keys() == gradients_again.keys() == adapter.parameters.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_weights_that_do_not_fit_are_refused(base: PreTrainedModel, trial: Callable[..., Trial]) -> None:
    with attached_adapter(base, trial(lora_rank=2).params) as adapter:
        small = adapter.tensors()
    with attached_adapter(base, trial(lora_rank=4).params) as adapter:
        with pytest.raises(TrainingError, match=r"lora_A.weight is \(2, 64\) in the checkpoint, but \(4, 64\) here"):
            adapter.load(small)
        with pytest.raises(TrainingError, match="first difference"):
            adapter.load(dict(list(small.items())[1:]))
