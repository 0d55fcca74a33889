"""An adapter that stays as it is under those that are trained: a finished parent on the base, for every row.

    y = W x + bias + s B A x, with this A and B frozen; what is trained adds its own delta to that.

It sits on the base as hooks, so that whatever calls a linear layer of the base, has it, and it can be taken off for a
while. Knows nothing of trials, slots or files to be written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qlora_core.adapters.adapter_folder import open_adapter
from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError
from qlora_core.model.adapter import read_fitting_adapter
from qlora_core.model.encoder_decoder import is_encoder_decoder


class FrozenParent:
    """The adapter in `folder` on `base`, from construction on.

    `digest` is what its children record of it. Its factors are kept in the precision that the base computes in.

    Raises:
        ModelError: it does not fit the base, is no sum of deltas (DoRA, biases, ...), or has a parent itself: fuse it
            with `qlora compose`, method sequential, first. TrainingError: a base of encoder and decoder.
    """

    def __init__(self, base: PreTrainedModel, folder: Path) -> None:
        if is_encoder_decoder(base):
            raise TrainingError(
                f"{type(base).__name__} has an encoder and a decoder; adapters on top of others are for decoders: "
                "begin with the parent's weights (train.start_as: weights)"
            )
        read_fitting_adapter(base, folder)
        adapter = open_adapter(folder)
        self.folder, self.digest = folder, adapter.digest
        self._base = base
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for module in adapter.modules:
            update = adapter.factors(module)
            a_ri, b_or = (factor.to(device=base.device, dtype=base.dtype) for factor in (update.a_ri, update.b_or))
            self._factors[module] = (a_ri, b_or)
        self._hooks: list[RemovableHandle] = []
        self._put_on()

    def check(self, params: TrainConfig) -> None:
        """Raises TrainingError for settings of a child that could not be fused with its parent."""
        if params.use_dora:
            raise TrainingError(
                "train.use_dora over a parent: its magnitudes rescale the base's own weight, so that the two cannot be "
                "fused; train plain LoRA, or begin with the parent's weights (train.start_as: weights)"
            )

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """While the block runs, the base is without it."""
        for hook in self._hooks:
            hook.remove()
        try:
            yield
        finally:
            self._put_on()

    def _put_on(self) -> None:
        self._hooks = [
            self._base.get_submodule(module).register_forward_hook(partial(_add, *factors))
            for module, factors in self._factors.items()
        ]


def _add(
    a_ri: torch.Tensor, b_or: torch.Tensor, module: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor
) -> torch.Tensor:
    x = args[0]
    return y + linear(linear(x.to(a_ri.dtype), a_ri), b_or).to(y.dtype)
