"""What becomes of an adapter's delta: predicted from the grid before anything is written, and read from what was.

Knows weights, module by module, and no losses. A delta smaller than half a step of the grid that the base sits on
rounds back to where it was: the dead zone. Shapes, as suffixes of names: o out_features, i in_features.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qlora_core.adapters.merge_source import MergeBase
from qlora_core.errors import ModelError
from qlora_core.quantization.blockwise import dequantize_into, quantize_tensor

_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class LayerDelta:
    """One module. `delta_over_weight` |delta|/|W|; `quantization_over_delta` q/delta = |W16 - deq(W4)|/|delta|, None
    without the original; `projection` <eff, delta>/<delta, delta>, `eff` what the merged weight has over the base.
    """

    module: str
    delta_norm: float
    delta_over_weight: float
    quantization_over_delta: float | None
    projection: float
    codes_changed: float | None = None


def predict(base: MergeBase, on: str) -> list[LayerDelta]:
    """Per module, what rounding W + delta to the nearest 4-bit value leaves, `on` the `dequantized` or `original` base.

    Nothing is written; one module's matrices are held at a time.

    Raises:
        ModelError: the original is not what the base was quantized from.
    """
    return [_predicted(base, module, on) for module in base.changed]


def read_effects(base: MergeBase, merged_weight: Callable[[str], torch.Tensor]) -> list[LayerDelta]:
    """Per module, what a merged checkpoint holds over the dequantized base; `merged_weight(module)` gives [o, i]."""
    layers = []
    for module in base.changed:
        delta_oi, base_oi = base.delta(module), base.dequantized(module)
        effect_oi = merged_weight(module).float() - base_oi
        if not torch.isfinite(effect_oi).all():
            raise ModelError(f"the merged weight of {module} holds NaN or infinity; nothing is written")
        layers.append(_layer(base, module, delta_oi, base_oi, effect_oi, None))
    return layers


def projection(layers: Sequence[LayerDelta]) -> float:
    """<eff, delta>/<delta, delta> over all modules together; 1 for an adapter that does nothing."""
    whole = math.fsum(layer.delta_norm**2 for layer in layers)
    return math.fsum(layer.projection * layer.delta_norm**2 for layer in layers) / whole if whole else 1.0


def delta_norm(layers: Iterable[LayerDelta]) -> float:
    """The Frobenius norm of all deltas together."""
    return math.sqrt(math.fsum(layer.delta_norm**2 for layer in layers))


def as_json(layers: Sequence[LayerDelta]) -> list[dict[str, Any]]:
    """The layers as plain data."""
    return [asdict(layer) for layer in layers]


def _predicted(base: MergeBase, module: str, on: str) -> LayerDelta:
    stored = base.source.stored(base.changed[module])
    settings: Mapping[str, Any] = {
        "type": stored.type,
        "blocksize": stored.blocksize,
        "double_quant": stored.nested_absmax is not None,
    }
    delta_oi, base_oi = base.delta(module), base.dequantized(module)
    start_oi = base_oi if on == "dequantized" else base.full_precision(module)
    if on == "original":
        again = quantize_tensor(start_oi, **settings)
        if not torch.equal(again.codes, stored.codes):
            share = (again.codes != stored.codes).double().mean().item()
            raise ModelError(
                f"{module} of the original does not quantize to the base's codes ({share:.1%} of bytes differ); name "
                "the checkpoint that this base was quantized from"
            )
    merged = quantize_tensor(start_oi + delta_oi, **settings)
    effect_oi = dequantize_into(merged, torch.empty(merged.shape)).sub_(base_oi)
    differing = merged.codes ^ stored.codes
    changed = ((differing >> 4) != 0).sum().item() + ((differing & 15) != 0).sum().item()
    return _layer(base, module, delta_oi, base_oi, effect_oi, changed / delta_oi.numel())


def _layer(
    base: MergeBase,
    module: str,
    delta_oi: torch.Tensor,
    base_oi: torch.Tensor,
    effect_oi: torch.Tensor,
    changed: float | None,
) -> LayerDelta:
    squares = _dot(delta_oi, delta_oi)
    norm, weight_norm = math.sqrt(squares), math.sqrt(_dot(base_oi, base_oi))
    over = None
    if base.original is not None and norm:
        lost_oi = base.full_precision(module).sub_(base_oi)
        over = math.sqrt(_dot(lost_oi, lost_oi)) / norm
    kept = _dot(effect_oi, delta_oi) / squares if squares else 1.0
    return LayerDelta(module, norm, norm / weight_norm if weight_norm else math.inf, over, kept, changed)


def _dot(first: torch.Tensor, second: torch.Tensor) -> float:
    """The inner product in float64, by parts."""
    one, two = first.reshape(-1), second.reshape(-1)
    return math.fsum(
        (one[start : start + _AT_A_TIME].double() @ two[start : start + _AT_A_TIME].double()).item()
        for start in range(0, len(one), _AT_A_TIME)
    )
