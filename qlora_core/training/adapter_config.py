"""From a trial's settings to PEFT's: which adapter, on which layers, and how an adapter is written for stock PEFT.

Knows nothing of steps or data.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError
from qlora_core.model.encoder_decoder import is_encoder_decoder
from qlora_core.training.pack.factors import SlotWeights
from qlora_core.training.pack.pack import linear_names

_STARTS: dict[str, Any] = {
    "default": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora",
    "loftq": True,  # from what quantization took, which the pack is handed, and over a base that stays as it is
}  # fmt: skip


def lora_config(base: PreTrainedModel, params: TrainConfig, modules: list[str] | None = None) -> LoraConfig:
    """PEFT's settings of a trial's adapter on this base; `modules`: the layers it is put on, by whole names.

    Raises:
        TrainingError: target modules or rank patterns that match nothing, or settings that exclude each other.
    """
    targets = target_names(base, params.target_modules)
    _check_patterns(base, params)
    if params.use_dora and params.lora_init in ("pissa", "olora"):
        raise TrainingError(
            f"train.lora_init {params.lora_init!r} and train.use_dora cannot be had together: the stored base stays as "
            "it is, and DoRA's magnitudes have no meaning beside what that start takes out of it; drop one"
        )
    return LoraConfig(
        r=params.lora_rank,
        lora_alpha=_plain(params.lora_alpha),  # pyright: ignore[reportArgumentType]  # PEFT scales by any number
        lora_dropout=params.lora_dropout,
        target_modules=modules or targets,
        rank_pattern=dict(params.rank_pattern),
        use_rslora=params.use_rslora,
        use_dora=params.use_dora,
        init_lora_weights=_STARTS[params.lora_init],
        bias="none",
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(base) else "CAUSAL_LM",
    )


def target_names(base: PreTrainedModel, target_modules: str | list[str]) -> list[str]:
    """The name endings PEFT is to match, sorted: those of all linear layers, or the given ones once they are checked.

    The output head never counts as a linear layer here: it stays in full precision and out of the adapter.

    Raises:
        TrainingError: a name matches no linear layer; the message lists what exists.
    """
    linear = linear_names(base)
    existing = sorted({name.rpartition(".")[2] for name in linear})
    if not linear:
        raise TrainingError(f"{type(base).__name__} has no linear layer to put an adapter on")
    if target_modules == "all-linear":
        return existing
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    missing = [target for target in wanted if not _matches(linear, target)]
    if missing or not wanted:
        raise TrainingError(
            f"target_modules {missing or wanted} match no linear layer of the base model; it has {', '.join(existing)} "
            "(or all-linear)"
        )
    return sorted(wanted)


def exported(weights: SlotWeights) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """An adapter's tensors on the CPU under PEFT's names, and the settings by which stock PEFT computes the same.

    A start that PEFT would take out of the base becomes part of the adapter, over the base as it is stored:
    s (B A - B0 A0) = s [B, -B0] [A; A0], of twice the rank and with alpha scaled so that s stays.
    """
    config = weights.config
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.named()}
    if not any(factors.start for factors in weights.factors.values()):
        return tensors, _plain_start(config)
    for name, factors in weights.factors.items():
        assert factors.start is not None
        a0, b0 = (part.detach().cpu() for part in factors.start)
        key = f"base_model.model.{name}.lora_{{}}.weight"
        tensors[key.format("A")] = torch.cat([tensors[key.format("A")], a0]).contiguous()
        tensors[key.format("B")] = torch.cat([tensors[key.format("B")], -b0], dim=1).contiguous()
    return tensors, _doubled(config)


def _plain_start(config: LoraConfig) -> LoraConfig:
    """The same adapter for its readers: stock PEFT would do any other start again, on the base, when it loads it."""
    settings: dict[str, Any] = {**config.to_dict(), "init_lora_weights": True}
    return LoraConfig(**settings)


def _doubled(config: LoraConfig) -> LoraConfig:
    settings: dict[str, Any] = config.to_dict()
    growth = math.sqrt(2) if config.use_rslora else 2
    settings |= {"r": 2 * config.r, "lora_alpha": _plain(growth * config.lora_alpha), "init_lora_weights": True}
    settings["rank_pattern"] = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    return LoraConfig(**settings)


def _check_patterns(base: PreTrainedModel, params: TrainConfig) -> None:
    linear = linear_names(base)
    lost = [ending for ending in params.rank_pattern if not _matches(linear, ending)]
    if lost:
        existing = sorted({name.rpartition(".")[2] for name in linear})
        raise TrainingError(
            f"train.rank_pattern names {lost}, which match no linear layer; it has {', '.join(existing)}"
        )


def _matches(names: list[str], ending: str) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for name in names)


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def check_loadable(weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Refuse stored weights that do not fit an adapter.

    Raises:
        TrainingError: a tensor is missing, too many, or of another shape.
    """
    if weights.keys() != wanted.keys():
        odd = sorted(weights.keys() ^ wanted.keys())
        raise TrainingError(f"the checkpoint's adapter does not fit this trial; first difference: {odd[0]}")
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            raise TrainingError(
                f"{name} is {tuple(weights[name].shape)} in the checkpoint, but {tuple(tensor.shape)} here"
            )
