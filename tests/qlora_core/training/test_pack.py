"""A pack of unlike adapters against each of them alone, and against PEFT: parameters, losses, gradients, the base."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.batches import labels_of, trained_tokens
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.checkpointing import recomputed_activations
from qlora_core.training.pack.layout import Part
from qlora_core.training.pack.lora_linear import PackedLoraLinear
from qlora_core.training.pack.pack import Pack
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial, TrialProgress

Rows = Callable[..., list[TokenRow]]
Trials = Callable[..., Trial]

UNLIKE: list[dict[str, Any]] = [
    {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.1},
    {"lora_rank": 64, "lora_alpha": 16.0, "lora_dropout": 0.0, "learning_rate": 1e-3, "weight_decay": 0.1},
    {"lora_rank": 8, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5, "micro_batch_size": 1},
    {"lora_rank": 16, "use_rslora": True, "micro_batch_size": 5, "gradient_accumulation_steps": 1, "seed": 9},
    {"lora_rank": 5, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e-2, "schedule": "cosine"},
    {"lora_rank": 6, "use_dora": True, "lora_dropout": 0.2, "lora_plus_ratio": 16.0, "optimizer": "lion"},
    {"lora_rank": 3, "lora_init": "pissa", "learning_rate": 1e-4, "group_by_length": False},
]


def _together(base: PreTrainedModel, rows: Rows, folder: Path, trials: list[Trial]) -> list[TrialProgress]:
    return Trainer(base, rows(26, seed=1), rows(5, seed=2), folder).run(trials, None)


def _weights(folder: Path, trial: Trial) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(folder / trial.id)
    assert newest is not None
    return newest.adapter()


# --- equal to alone


def test_unlike_adapters_in_one_pack_equal_separate_runs_in_float64(
    base64: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    # bitsandbytes has no float64 Lion
    wide = [{**own, "optimizer": own.get("optimizer", "adamw").replace("lion", "adamw")} for own in UNLIKE]
    trials = [trial(f"t{number}", max_steps=25, **own) for number, own in enumerate(wide)]
    together = _together(base64, rows, tmp_path / "pack", trials)
    assert [progress.error for progress in together] == [None] * len(UNLIKE)
    for one, progress in zip(trials, together, strict=True):
        (alone,) = _together(base64, rows, tmp_path / "alone", [one])
        packed, own = _weights(tmp_path / "pack", one), _weights(tmp_path / "alone", one)
        assert max((packed[name] - own[name]).abs().max().item() for name in own) < 1e-10
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(progress.curve, alone.curve, strict=True)) < 1e-10
        assert progress.curve[0]["loss"] != progress.curve[-1]["loss"]


def test_losses_in_float32_agree_within_rounding(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    trials = [trial(f"t{n}", max_steps=8, **own) for n, own in enumerate(UNLIKE)]
    together = _together(base, rows, tmp_path / "pack", trials)
    for one, progress in zip(trials, together, strict=True):
        (alone,) = _together(base, rows, tmp_path / "alone", [one])
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(progress.curve, alone.curve, strict=True)) < 5e-5


def test_neighbours_that_fail_or_change_leave_a_trial_as_it_is(
    base64: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    mine = trial("mine", max_steps=5)
    neighbours = {
        "quiet": trial("other", max_steps=5, seed=1),
        "wild": trial("other", max_steps=2, learning_rate=1.0, optimizer="sgd", lora_rank=32, max_grad_norm=1e30),
        "refused": trial("other", target_modules=["nothing"]),
    }
    found = {}
    for name, other in neighbours.items():
        first, second = _together(base64, rows, tmp_path / name, [other, mine])
        assert (first.error is not None) == (name == "refused")
        found[name] = (second, _weights(tmp_path / name, mine))
    (alone,) = _together(base64, rows, tmp_path / "alone", [mine])
    own = _weights(tmp_path / "alone", mine)
    for progress, weights in found.values():
        assert progress.error is None and len(progress.curve) == len(alone.curve) == 5
        assert max((weights[name] - own[name]).abs().max().item() for name in own) < 1e-10


def test_the_order_of_slots_changes_nothing(base64: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path) -> None:
    trials = [trial(f"t{n}", max_steps=4, lora_rank=2 + n, seed=n) for n in range(3)]
    _together(base64, rows, tmp_path / "forward", trials)
    _together(base64, rows, tmp_path / "backward", trials[::-1])
    for one in trials:
        forward, backward = _weights(tmp_path / "forward", one), _weights(tmp_path / "backward", one)
        assert max((forward[name] - backward[name]).abs().max().item() for name in forward) < 1e-10


# --- equal to PEFT


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
        {"target_modules": ["q_proj", "down_proj"], "r": 8, "lora_alpha": 16, "use_dora": True},
        {"target_modules": ["up_proj", "k_proj"], "r": 3, "lora_alpha": 2, "use_rslora": True},
        {"target_modules": ["o_proj", "gate_proj"], "r": 4, "lora_alpha": 8, "rank_pattern": {"o_proj": 7}},
    ],
)
def test_loss_and_gradients_are_those_of_peft(base64: PreTrainedModel, rows: Rows, settings: dict[str, Any]) -> None:
    reference = get_peft_model(copy.deepcopy(base64), LoraConfig(**settings)).double().eval()
    pack = Pack(base64)
    slot = pack.fill(LoraConfig(**settings), seed=3)
    mine = dict(pack.weights(slot).named())
    theirs = {_plain(name): value for name, value in reference.named_parameters() if value.requires_grad}
    assert theirs.keys() == mine.keys()
    generator = torch.Generator().manual_seed(0)
    for name in mine:
        fresh = 0.1 * torch.randn(mine[name].shape, generator=generator, dtype=torch.float64) + ("magnitude" in name)
        mine[name].data.copy_(fresh)
        theirs[name].data.copy_(fresh)
    batch = rows(4, seed=5)
    tokens = sum(trained_tokens(row) for row in batch)
    (loss_sum,) = pack.backward([Part(slot, batch, 0, 0)], [tokens])
    expected = torch.zeros((), dtype=torch.float64)
    for row in batch:
        places, labels = zip(*labels_of(row), strict=True)
        logits = reference(input_ids=torch.tensor([row.input_ids])).logits[0, list(places)]
        expected = expected + cross_entropy(logits, torch.tensor(labels), reduction="sum")
    (expected / tokens).backward()
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in theirs.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-9, atol=1e-13)


def _plain(name: str) -> str:
    return name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def test_gradients_match_a_finite_difference(base64: PreTrainedModel, rows: Rows, trial: Trials) -> None:
    pack = Pack(base64)
    slot = pack.fill(lora_config(base64, trial(lora_dropout=0.4).params), seed=1)
    for parameter in pack.weights(slot).flat().values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    # A wide shift: transformers keeps norms and rotary tables in float32, so the loss is exact to about 1e-8 only
    part, shift = Part(slot, rows(3, seed=3), 0, 7), 1e-2
    tokens = sum(trained_tokens(row) for row in part.rows)
    pack.backward([part], [tokens])
    named = dict(pack.weights(slot).named())
    gradients = {name: _gradient(parameter).clone() for name, parameter in named.items()}
    for name, parameter in list(named.items())[::5]:
        place = int(gradients[name].abs().argmax())
        sums = []
        for sign in (1, -1):
            parameter.data.view(-1)[place] += sign * shift
            sums.append(pack.backward([part], [tokens]).item())  # with the dropout of the same step
            parameter.data.view(-1)[place] -= sign * shift
        slope = (sums[0] - sums[1]) / (2 * shift) / tokens
        assert slope == pytest.approx(gradients[name].view(-1)[place].item(), rel=1e-2)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_micro_batches_add_up_to_the_token_weighted_mean(base64: PreTrainedModel, rows: Rows, trial: Trials) -> None:
    batch = rows(7, seed=3)
    counts = [trained_tokens(row) for row in batch]
    found = {}
    for name, sizes in {"whole": [7], "parts": [3, 3, 1], "mean of means": [1] * 7}.items():
        pack = Pack(base64)
        slot = pack.fill(lora_config(base64, trial(lora_dropout=0.3).params), seed=1)
        place = 0
        for size in sizes:
            own = batch[place : place + size]
            tokens = 7 * sum(trained_tokens(row) for row in own) if name == "mean of means" else sum(counts)
            pack.backward([Part(slot, own, place, 2)], [tokens])
            place += size
        found[name] = _gradient(pack.weights(slot).flat()["b"]).clone()
        pack.free(slot)
    torch.testing.assert_close(found["parts"], found["whole"], rtol=1e-10, atol=1e-14)
    assert (found["mean of means"] - found["whole"]).norm() > 1e-3 * found["whole"].norm()


# --- slots


def test_equal_seeds_give_equal_adapters_in_any_slot(base: PreTrainedModel, trial: Trials) -> None:
    pack = Pack(base)
    first, second, other = (pack.fill(lora_config(base, trial().params), seed) for seed in (1, 1, 2))
    values = [dict(pack.weights(slot).flat())["a"] for slot in (first, second, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_a_freed_slot_is_filled_again_while_others_stay(base: PreTrainedModel, rows: Rows, trial: Trials) -> None:
    pack = Pack(base)
    configs = [lora_config(base, trial(lora_rank=rank, lora_dropout=0.0).params) for rank in (2, 3)]
    kept, gone = pack.fill(configs[0], 1), pack.fill(configs[1], 2)
    part = Part(kept, rows(2), 0, 0)
    before = pack.backward([part], [9]).item()
    pack.free(gone)
    assert pack.fill(configs[1], 5) == gone
    assert pack.backward([part], [9]).item() == before


def test_the_base_is_the_same_to_the_byte_when_all_slots_are_free(
    base: PreTrainedModel, rows: Rows, trial: Trials
) -> None:
    before, modules = _bytes(base), [(name, id(module)) for name, module in base.named_modules()]
    pack = Pack(base)
    slots = [pack.fill(lora_config(base, trial(lora_rank=rank).params), rank) for rank in (2, 3)]
    assert any(isinstance(module, PackedLoraLinear) for module in base.modules())
    with recomputed_activations(base, wanted=True):
        pack.backward([Part(slot, rows(2), 0, 0) for slot in slots], [9, 9])
    for slot in slots:
        pack.free(slot)
    assert _bytes(base) == before
    assert [(name, id(module)) for name, module in base.named_modules()] == modules
    assert not any(module.training for module in base.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.parameters())
    assert not base.is_activation_checkpointing
    assert base.config._attn_implementation == "sdpa"


def _bytes(base: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_recomputing_activations_runs_layers_twice_and_gives_the_same_gradients(
    base: PreTrainedModel, rows: Rows, trial: Trials
) -> None:
    found = {}
    for wanted in (False, True):
        pack = Pack(base)
        slot = pack.fill(lora_config(base, trial(lora_dropout=0.3).params), seed=1)
        pack.weights(slot).flat()["b"].data.fill_(0.01)
        seen: list[str] = []
        hook = base.get_submodule("model.layers.0.input_layernorm").register_forward_hook(
            lambda *_, seen=seen: seen.append("forward")
        )
        with recomputed_activations(base, wanted=wanted):
            sums = pack.backward([Part(slot, rows(4), 0, 0)], [30])
        hook.remove()
        flat = {name: _gradient(parameter).clone() for name, parameter in pack.weights(slot).flat().items()}
        found[wanted] = (sums, flat, len(seen))
        pack.free(slot)
    assert (found[False][2], found[True][2]) == (1, 2)
    assert torch.equal(found[False][0], found[True][0])
    assert all(torch.equal(found[False][1][name], found[True][1][name]) for name in ("a", "b"))


def test_targets_and_patterns_that_match_nothing_are_refused_with_what_exists(
    base: PreTrainedModel, trial: Trials
) -> None:
    for settings, message in (
        ({"target_modules": ["q_proj", "query"]}, r"\['query'\] match no linear layer.* k_proj, .*v_proj"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"rank_pattern": {"nothing": 3}}, r"rank_pattern names \['nothing'\].*q_proj"),
        ({"use_dora": True, "lora_init": "pissa"}, "cannot be had together"),
    ):
        with pytest.raises(TrainingError, match=message):
            lora_config(base, trial(**settings).params)
