"""The memory plan: parts against what real tiny models hold and keep, choices, refusals, configs without weights."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import TokenRow
from qlora_core.errors import ModelError, TrainingError
from qlora_core.quantization.checkpoint import read_tensors
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.memory.activations import layer_bytes_per_token
from qlora_core.training.memory.parts import (
    VALIDATION_ROWS,
    MemoryParts,
    Workload,
    static_parts,
    training_parts,
    validation_parts,
)
from qlora_core.training.memory.plan import MemoryPlan, plan_memory, refuse_unfit
from qlora_core.training.memory.shapes import CALIBRATED, LinearShape, ModelShapes, read_shapes
from qlora_core.training.optimizer import TrialOptimizer
from qlora_core.training.pack.layout import Part
from qlora_core.training.pack.pack import Pack
from qlora_core.training.scoring import VALIDATION_BATCH_ROWS

_LLAMA_LIKE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"head_dim": 16},
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | {"head_dim": 32},
    "gemma": _LLAMA_LIKE | {"num_key_value_heads": 1, "head_dim": 16},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_positions": 64},
}
ROWS, TOKENS = 2, 16


def config_of(family: str, layers: int) -> Any:
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    settings = {**FAMILIES[family], name: layers, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1}
    return AutoConfig.for_model(family, **settings)


def model_of(family: str, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config_of(family, layers), dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):  # as quantization leaves it: a Linear
            model.set_submodule(name, torch.nn.Linear(module.weight.shape[0], module.weight.shape[1], dtype=dtype))
    return model.requires_grad_(False).eval()


def kept_bytes(
    family: str, layers: int, dtype: torch.dtype, train: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Bytes of all storages that autograd keeps of one training pass, weights left out."""
    model = model_of(family, layers, dtype)
    pack = Pack(model)
    assert pack.end_to_end
    slot = pack.fill(lora_config(model, train), 0)
    own = [*model.parameters(), *model.buffers(), *pack.weights(slot).flat().values()]
    own_places = {value.untyped_storage()._cdata for value in own}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own_places:
            kept[storage._cdata] = storage
        return tensor

    rows = [
        TokenRow(str(row), [(row + place) % 128 for place in range(TOKENS)], [True] * TOKENS) for row in range(ROWS)
    ]
    # What is kept is all there between the passes: the backward pass, which would let go of it, is left out
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: None)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        pack.backward([Part(slot, rows, 0, 0)], [ROWS * (TOKENS - 1)])
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_a_layer_are_what_autograd_keeps(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of(family, 3).save_pretrained(tmp_path)
    train = TrainConfig(lora_rank=4)
    three, two = (kept_bytes(family, layers, dtype, train, monkeypatch) for layers in (3, 2))
    lora = workload(train).lora
    planned = ROWS * TOKENS * layer_bytes_per_token(read_shapes(tmp_path), lora, dtype.itemsize)
    # Gemma's norms keep 1 + weight beside the tensors of the batch: two vectors of the hidden size
    constant = 2 * 64 * 4 if family == "gemma" else 0
    assert three - two == planned + constant


def test_families_compared_are_those_called_calibrated() -> None:
    assert set(FAMILIES) == set(CALIBRATED)


def test_activations_without_some_targets_are_what_autograd_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of("llama", 3).save_pretrained(tmp_path)
    train = TrainConfig(lora_rank=4, target_modules=["q_proj", "v_proj"])
    three, two = (kept_bytes("llama", layers, torch.float32, train, monkeypatch) for layers in (3, 2))
    assert three - two == ROWS * TOKENS * layer_bytes_per_token(read_shapes(tmp_path), workload(train).lora, 4)


@pytest.mark.parametrize(("dtype", "beside"), [(torch.float32, 0.0), (torch.bfloat16, 0.04)], ids=str)
def test_activations_under_dora_are_what_autograd_keeps(
    dtype: torch.dtype, beside: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of("llama", 3).save_pretrained(tmp_path)
    train = TrainConfig(lora_rank=4, use_dora=True)
    three, two = (kept_bytes("llama", layers, dtype, train, monkeypatch) for layers in (3, 2))
    planned = ROWS * TOKENS * layer_bytes_per_token(read_shapes(tmp_path), workload(train).lora, dtype.itemsize)
    # The gains, norms and magnitudes of all 576 outputs of a layer, which do not grow with the tokens; in bf16 the
    # float32 forms of some inputs, which the margin is for
    constant = 3 * 4 * (64 + 32 + 32 + 64 + 160 + 160 + 64)
    assert 0 <= three - two - planned - constant <= beside * planned


def workload(train: TrainConfig, tokens: int = 32, **settings: Any) -> Workload:
    return Workload(train, QuantizeConfig(), tokens, tokens, **settings)


def test_validation_rows_are_the_trainers() -> None:
    assert VALIDATION_ROWS == VALIDATION_BATCH_ROWS


def test_codes_are_the_bytes_written(nf4_folder: Path) -> None:
    tensors = read_tensors(nf4_folder)
    quantized = {name.removesuffix(".absmax") for name in tensors if name.endswith(".weight.absmax")}
    written = sum(
        tensor.size_bytes
        for name, tensor in tensors.items()
        if ".quant_state." not in name and any(name == of or name.startswith(f"{of}.") for of in quantized)
    )
    parts = static_parts(read_shapes(nf4_folder), workload(TrainConfig()), "scratch", 4)
    assert parts.codes_bytes == written


@pytest.mark.parametrize("dora", [False, True])
def test_weights_and_adapter_are_those_of_the_model(nf4_folder: Path, base: PreTrainedModel, dora: bool) -> None:
    train = TrainConfig(lora_rank=4, rank_pattern={"down_proj": 8}, optimizer="adamw", use_dora=dora)
    pack = Pack(base)
    flat = pack.weights(pack.fill(lora_config(base, train), 0)).flat()
    optimizer = TrialOptimizer(flat, train)
    for values in flat.values():
        assert values.grad is not None
        values.grad.fill_(1.0)
    optimizer.step(1e-3)
    state = [value for name, value in optimizer.state_tensors().items() if not name.endswith("|step")]
    parts = static_parts(read_shapes(nf4_folder), workload(train), "dense", 4)
    whole = [value for name, value in base.named_parameters() if value.is_floating_point() and "factors" not in name]
    assert parts.kept_weights_bytes == sum(value.nbytes for value in whole)
    assert parts.adapter_bytes == parts.gradient_bytes == sum(values.nbytes for values in flat.values())
    assert parts.optimizer_bytes == sum(value.nbytes for value in state)
    # Four of 64 x 64 less the grouped keys and values, and three of 64 x 128, in each of two layers
    assert parts.dense_weights_bytes == 2 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


def test_8_bit_state_is_what_the_optimizer_holds() -> None:
    train = TrainConfig(optimizer="paged_adamw_8bit", lora_rank=8)
    shapes = made_up(layers=1)
    sizes = {"a": 8 * 3 * 256, "b": 8 * (256 + 1024 + 256)}
    weights = {name: torch.nn.Parameter(torch.zeros(2 * size)) for name, size in sizes.items()}
    for values in weights.values():
        values.grad = torch.ones_like(values)
    optimizer = TrialOptimizer(weights, train)
    optimizer.step(1e-3)
    held = {
        name: value for name, value in optimizer.state_tensors().items() if "qmap" not in name and "step" not in name
    }
    planned = static_parts(replace(shapes, linears=linears_for(weights)), workload(train), "scratch", 4)
    assert planned.optimizer_bytes == sum(value.nbytes for value in held.values())


def linears_for(weights: dict[str, torch.nn.Parameter]) -> tuple[LinearShape, ...]:
    """One Linear whose A and B at rank 8 are as large as the buffers."""
    return (LinearShape("layers.0.mlp.down_proj", weights["a"].numel() // 8, weights["b"].numel() // 8),)


def made_up(layers: int = 4, hidden: int = 1024, vocabulary: int = 1000) -> ModelShapes:
    """A Llama of round sizes that exists nowhere."""
    width = 4 * hidden
    sides = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        **{f"mlp.{name}_proj": (hidden, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, hidden),
    }
    linears = [LinearShape(f"layers.{layer}.{name}", *pair) for layer in range(layers) for name, pair in sides.items()]
    return ModelShapes(
        "llama", layers, hidden, vocabulary, 8, 8, hidden // 8, "silu", tuple(linears), vocabulary * hidden,
        (hidden, hidden), 2, layer_norm=False, parallel=False, rotary=True,
    )  # fmt: skip


TRAIN = TrainConfig(lora_rank=8, micro_batch_size=4, gradient_accumulation_steps=3)


def needed(**settings: Any) -> int:
    """Bytes a process needs for the made-up model, run as asked."""
    train = TRAIN.model_copy(update={key: value for key, value in settings.items() if key != "residency"})
    work = workload(train, 512)
    plan = plan_memory(made_up(), work, None, "cpu", residency=settings.get("residency", "dense"), fixed=True)
    return plan.needed_bytes


def planned(available: int | None, **settings: Any) -> MemoryPlan:
    return plan_memory(made_up(), workload(TRAIN, 512), available, "cpu", **settings)


def chosen(plan: MemoryPlan) -> tuple[str, bool, int, int]:
    return plan.residency, plan.gradient_checkpointing, plan.micro_batch_size, plan.gradient_accumulation_steps


def test_choices_come_in_order_as_memory_shrinks() -> None:
    steps = [
        (needed(), ("dense", False, 4, 3)),
        (needed(residency="scratch"), ("scratch", False, 4, 3)),
        (needed(gradient_checkpointing=True), ("dense", True, 4, 3)),
        (needed(gradient_checkpointing=True, residency="scratch"), ("scratch", True, 4, 3)),
    ]
    assert [size for size, _ in steps] == sorted((size for size, _ in steps), reverse=True)
    for size, way in steps:
        assert chosen(planned(size)) == way
        assert chosen(planned(size - 1)) != way
    small = planned(steps[-1][0] - 1)
    assert small.fits
    assert small.micro_batch_size * small.gradient_accumulation_steps == 12
    assert small.micro_batch_size < 4
    assert any("rounding" in reason for reason in small.reasons)


def test_unknown_memory_is_said_and_takes_the_first_way() -> None:
    plan = planned(None)
    assert plan.fits
    assert chosen(plan) == ("dense", False, 4, 3)
    assert "does not say" in plan.reasons[0]


def test_residency_asked_for_is_kept() -> None:
    assert planned(None, residency="bitsandbytes").residency == "bitsandbytes"
    assert planned(needed(residency="scratch"), residency="dense").residency == "dense"


def test_fixed_plan_changes_residency_alone() -> None:
    plan = planned(needed(residency="scratch") - 1, fixed=True)
    assert not plan.fits
    assert chosen(plan) == ("scratch", False, 4, 3)


def test_refusal_names_bytes_and_the_first_setting_that_helps() -> None:
    available = needed(gradient_checkpointing=True, residency="scratch")
    plan = planned(available, fixed=True)
    with pytest.raises(TrainingError) as refused:
        refuse_unfit(plan, made_up(), workload(TRAIN, 512), residency="auto", fixed=True)
    message = str(refused.value)
    assert f"{plan.needed_bytes} bytes" in message
    assert f"and {available} (" in message
    assert message.endswith("set train.gradient_checkpointing: true")
    # The control: with that setting it is not refused
    helped = workload(TRAIN.model_copy(update={"gradient_checkpointing": True}), 512)
    refuse_unfit(
        plan_memory(made_up(), helped, available, "cpu", fixed=True), made_up(), helped, residency="auto", fixed=True
    )


def test_refusal_says_when_no_setting_helps() -> None:
    with pytest.raises(TrainingError, match="no single setting would do"):
        refuse_unfit(planned(1 << 20), made_up(), workload(TRAIN, 512), residency="auto")


def test_dense_that_does_not_fit_is_told_to_take_the_scratch() -> None:
    plan = planned(needed(residency="scratch"), residency="dense", fixed=True)
    with pytest.raises(TrainingError, match=r"compute\.residency: scratch"):
        refuse_unfit(plan, made_up(), workload(TRAIN, 512), residency="dense", fixed=True)


def test_paged_state_can_leave_a_gpu_and_is_said_to() -> None:
    work = workload(TRAIN.model_copy(update={"lora_rank": 64, "optimizer": "paged_adamw_32bit"}), 512)
    roomy = plan_memory(made_up(), work, None, "cuda", residency="scratch", fixed=True)
    assert roomy.paged_bytes == roomy.training.optimizer_bytes > 0
    tight = plan_memory(made_up(), work, roomy.needed_bytes, "cuda", residency="scratch", fixed=True)
    assert tight.fits
    assert any("spike" in reason for reason in tight.reasons)
    plain = replace(work, train=work.train.model_copy(update={"optimizer": "adamw"}))
    assert not plan_memory(made_up(), plain, roomy.needed_bytes, "cuda", residency="scratch", fixed=True).fits


def test_config_alone_gives_the_shapes_of_the_weights(tmp_path: Path) -> None:
    model = model_of("llama", 2, torch.float32)
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    from_headers, from_config = read_shapes(tmp_path / "whole"), read_shapes(tmp_path / "bare")
    assert sorted(linear.name for linear in from_headers.linears) == sorted(one.name for one in from_config.linears)
    assert asdict(replace(from_headers, linears=())) == asdict(replace(from_config, linears=()))
    assert from_config.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert read_shapes(tmp_path / "bare" / "config.json") == from_config


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_tied_embeddings_count_once(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config_of(family, 2))
    model.save_pretrained(tmp_path)
    assert read_shapes(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_hub_name_that_cannot_be_reached_and_other_faults_are_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hub's own switch: without it, it would try for half a minute where there is no network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"config\.json of nobody/nothing .* check name and network"):
        read_shapes("nobody/nothing")
    with pytest.raises(ModelError, match="is no checkpoint folder"):
        read_shapes("nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ModelError, match=r"unheard_of.* is no causal language model"):
        read_shapes(tmp_path)


def test_larger_pack_takes_as_many_adapters_and_rows() -> None:
    one, three = (static_parts(made_up(), workload(TRAIN, pack_size=size), "dense", 4) for size in (1, 3))
    assert three.adapter_bytes == 3 * one.adapter_bytes
    assert three.codes_bytes == one.codes_bytes
    kept = [training_parts(made_up(), workload(TRAIN, pack_size=size), "dense", 4, "cpu") for size in (1, 3)]
    assert kept[1].activation_bytes == 3 * kept[0].activation_bytes


@pytest.mark.parametrize(
    ("device", "stored_bytes", "compute_bytes", "counted"),
    [("cpu", 2, 4, True), ("cpu", 4, 4, False), ("cpu", 4, 2, True), ("cuda", 2, 4, False)],
)
def test_converted_weights_leave_the_pages_they_were_read_from(
    device: str, stored_bytes: int, compute_bytes: int, counted: bool
) -> None:
    shapes = replace(made_up(), stored_bytes=stored_bytes)
    parts = [
        account(shapes, workload(TRAIN), "scratch", compute_bytes, device)
        for account in (training_parts, validation_parts)
    ]
    # The made-up model's embeddings alone: all of its Linears are quantized
    expected = shapes.kept_parameters * stored_bytes if counted else 0
    assert [part.mapped_bytes for part in parts] == [expected, expected]


def test_the_config_names_the_dtype_of_what_is_kept(nf4_folder: Path, tmp_path: Path) -> None:
    config = json.loads((nf4_folder / "config.json").read_text())
    for dtype, size in (("bfloat16", 2), ("float32", 4), (None, 4)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": dtype, "torch_dtype": None}))
        assert read_shapes(tmp_path).stored_bytes == size


def test_total_is_the_sum_of_the_parts() -> None:
    parts = MemoryParts(*range(1, 12))
    assert parts.total_bytes == sum(asdict(parts).values()) == 66
