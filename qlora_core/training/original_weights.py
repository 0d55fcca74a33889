"""The weights of the checkpoint that a quantized base was made from, read one at a time by the base's module names.

Knows checkpoints; knows nothing of adapters.
"""

from pathlib import Path

import torch

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError, TrainingError
from qlora_core.quantization.blueprint import draw_blueprint
from qlora_core.quantization.tensor_source import LocalSource

# NF4's error is 0.09 of a weight's norm and int4's 0.11 (normal weights); weights of another model are 1.4 apart
_LARGEST_ERROR = 0.5


class OriginalWeights:
    """The unquantized checkpoint in `folder`.

    Raises TrainingError where there is none that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._source = LocalSource(folder)
            tensors = draw_blueprint(self._source, QuantizeConfig()).tensors
        except (ModelError, OSError) as error:
            raise TrainingError(f"train.lora_init loftq needs the unquantized base: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in tensors}

    def residual(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """What quantization took from the linear layer `name`: its original weight less `stored`, [O, I] in float32.

        Raises:
            TrainingError: the checkpoint has no such layer, or the two are no weights of one model.
        """
        planned = self._tensors.get(f"{name}.weight")
        if planned is None:
            raise TrainingError(f"{self._folder} has no weight of {name}: it is not what the base was quantized from")
        original = self._source.read(planned.source).to(torch.float32)
        original = (original.T if planned.transposed else original).to(stored.device)
        if original.shape != stored.shape:
            raise TrainingError(
                f"{name} is {tuple(original.shape)} in {self._folder} and {tuple(stored.shape)} in the base: it is not "
                "what the base was quantized from"
            )
        residual = original - stored.float()
        error = (residual.norm() / original.norm().clamp_min(1e-30)).item()
        if not error <= _LARGEST_ERROR:
            raise TrainingError(
                f"{name} in {self._folder} is {error:.2f} of its norm away from the base's, more than quantization "
                "does: it is not what the base was quantized from"
            )
        return residual
