"""What quantization does to a layer's output on inputs that really reach it. Knows hooks and norms, and no files.

Shapes, as suffixes of names: n tokens, i in_features, o out_features.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_core.model.perplexity import TOKENS_PER_BATCH
from qlora_core.progress import progress_bar
from qlora_core.quantization.quality_weights import LayerWeights, restore


def output_errors(model: PreTrainedModel, layers: LayerWeights, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """For each layer |X (Ŵ - W)^T| / |X W^T|, Frobenius norms, over the inputs X that the rows' tokens bring to it.

    W is the weight in `model`, which must be the full-precision one; Ŵ the stored weight. Biases are left out. Inputs
    are those of the full-precision model, so a layer's figure holds no error of the layers before it. Weights are
    restored one at a time, while the model runs; nothing is kept but two sums a layer. Products are float32, sums
    float64. Rows are token ids, none longer than the model takes; a layer that no token reaches gives 0.
    """
    sums = {name: [0.0, 0.0] for name in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_adding(layers, name, sums[name])) for name in layers
    ]
    try:
        with progress_bar("Calibrating", len(rows)) as advance, torch.inference_mode():
            for batch in _equal_lengths(rows):
                model(input_ids=torch.tensor(batch, device=model.device), use_cache=False)
                advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: math.sqrt(error / whole) if whole else 0.0 for name, (error, whole) in sums.items()}


def _adding(layers: LayerWeights, name: str, sums: list[float]) -> Any:
    """A forward pre-hook that adds a batch's squared error and squared output to `sums`."""

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x_ni = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        weight_oi = layers.loaded(name).float()
        error_oi = restore(layers.stored(name)).to(weight_oi.device) - weight_oi
        sums[0] += _norm_squared(x_ni @ error_oi.T)
        sums[1] += _norm_squared(x_ni @ weight_oi.T)

    return add


def _norm_squared(values: torch.Tensor) -> float:
    return values.square().sum(dtype=torch.float64).item()


def _equal_lengths(rows: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
    """Batches without padding, whose tokens would have to be told apart in every layer, whatever its shape."""
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(list(row))
    for length, alike in sorted(by_length.items()):
        size = max(1, TOKENS_PER_BATCH // length)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]
