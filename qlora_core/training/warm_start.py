"""An adapter that begins where another one ended: the weights of a PEFT folder, put into a slot of the pack.

The slot's own settings stand; a folder that another rank, scale or choice of layers has written is refused, since its
weights would then mean something else. Knows nothing of who trained it.
"""

from pathlib import Path

import torch

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError
from qlora_core.model.adapter import read_adapter_config, read_adapter_tensors
from qlora_core.training.pack.factors import SlotWeights, scale_of

_NAMES_SHOWN = 3


def start_from(weights: SlotWeights, folder: Path, params: TrainConfig) -> None:
    """Copy the adapter in `folder` into a freshly filled slot, in the slot's precision.

    Raises TrainingError for tensors that the slot lacks, that the folder lacks, of another shape, or not finite, for
    another scale, and for a start of its own in `params`; ModelError where the folder is no plain LoRA adapter.
    """
    if params.lora_init != "default":
        raise TrainingError(
            f"train.lora_init {params.lora_init!r} and train.start_from are two beginnings of one adapter; drop one"
        )
    config, tensors = read_adapter_config(folder), read_adapter_tensors(folder)
    mine = dict(weights.named())
    _check_names(folder, set(mine), set(tensors))
    for name, parameter in mine.items():
        if tensors[name].shape != parameter.shape:
            raise TrainingError(
                f"{name} is {tuple(tensors[name].shape)} in {folder} and {tuple(parameter.shape)} as configured; "
                "use the start's train.lora_rank and rank_pattern, or train from scratch"
            )
        if not torch.isfinite(tensors[name]).all():
            raise TrainingError(f"{name} in {folder} is not finite; train from scratch, or from another adapter")
    for name, factors in weights.factors.items():
        scale = scale_of(config, name, factors.a.shape[0])
        if abs(scale - factors.scale) > 1e-9 * abs(factors.scale):
            raise TrainingError(
                f"{name} is scaled by {scale:g} in {folder} and by {factors.scale:g} as configured; use the start's "
                "train.lora_alpha and use_rslora, or train from scratch"
            )
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])


def _check_names(folder: Path, mine: set[str], theirs: set[str]) -> None:
    if mine == theirs:
        return
    lacking, beyond = sorted(mine - theirs), sorted(theirs - mine)
    told = [f"it lacks {', '.join(lacking[:_NAMES_SHOWN])}"] if lacking else []
    told += [f"it has {', '.join(beyond[:_NAMES_SHOWN])} beside" if beyond else ""]
    raise TrainingError(
        f"{folder} adapts other layers than configured ({'; '.join(filter(None, told))}); use the start's "
        "train.target_modules and use_dora, or train from scratch"
    )
