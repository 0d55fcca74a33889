"""Rounding to NF4 that looks at the inputs: GPTQ (Frantar et al. 2023) on bitsandbytes' own grid, its scales kept.

The blocks' absmax, double-quantized as they will be stored, are taken from the weight first; then columns are rounded
one after the other and each error is made up for in the columns not yet rounded. What comes out is the stored form
itself: rounding its values again would find other blocks' maxima. Knows matrices and hooks, no files.
Shapes, as suffixes of names: o out_features, i in_features, n tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, quantize_tensor
from qlora_core.quantization.codebooks import codebook

_COLUMNS_AT_ONCE = 128
_ONE = 15  # NF4's code of 1.0
_ZERO = 7  # and of 0.0


def calibrated_nf4(
    weight_oi: torch.Tensor, moments_ii: torch.Tensor, *, blocksize: int, double_quant: bool, dampening: float
) -> QuantizedTensor:
    """The NF4 form of `weight_oi` (float32) that keeps its outputs on inputs of second moments `moments_ii` = X^T X.

    Minimises |X (W^ - W)^T| greedily, columns of large moments first. `dampening` times the mean moment is added to the
    diagonal. With moments that are a multiple of the identity it is rounding to nearest.
    """
    nearest = quantize_tensor(weight_oi, type="nf4", blocksize=blocksize, double_quant=double_quant)
    ones = replace(nearest, codes=torch.full_like(nearest.codes, _ONE << 4 | _ONE))
    scales_oi = dequantize_into(ones, torch.empty(weight_oi.shape))
    order = moments_ii.diagonal().argsort(descending=True)
    factor_ii = _inverse_factor(moments_ii[order][:, order], dampening)
    codes_oi = torch.empty(weight_oi.shape, dtype=torch.uint8)
    codes_oi[:, order] = _round_columns(weight_oi[:, order].clone(), scales_oi[:, order], factor_ii)
    flat = torch.nn.functional.pad(codes_oi.reshape(-1), (0, codes_oi.numel() % 2), value=_ZERO)
    return replace(nearest, codes=(flat[0::2] << 4 | flat[1::2]).reshape(-1, 1))


def input_moments(model: PreTrainedModel, run: Callable[[], None], modules: Sequence[str]) -> dict[str, torch.Tensor]:
    """X^T X [i, i] in float32 of the inputs that reach each module of `model` while `run()` runs it."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_ni = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            moments = (x_ni.T @ x_ni).cpu()
            found[name] = found[name].add_(moments) if name in found else moments

        return hook

    with _hooks(model, {name: add(name) for name in modules}):
        run()
    return found


class MomentShelf:
    """Moments of modules in the order they will be asked for, as many at a time as `limit_bytes` holds.

    Each filling runs the model once over the calibration rows; what was given is forgotten.
    """

    def __init__(
        self, model: PreTrainedModel, run: Callable[[], None], widths: Mapping[str, int], limit_bytes: int
    ) -> None:
        self._model, self._run, self._limit = model, run, limit_bytes
        self._widths = dict(widths)
        self._held: dict[str, torch.Tensor] = {}
        self.passes = 0

    def take(self, module: str) -> torch.Tensor:
        """The moments of a module, which must be one of those announced; they are given once."""
        if module not in self._held:
            self._held = input_moments(self._model, self._run, self._next_from(module))
            self.passes += 1
        return self._held.pop(module)

    def _next_from(self, module: str) -> list[str]:
        waiting = list(self._widths)
        chosen, room = [], self._limit
        for name in waiting[waiting.index(module) :]:
            size = 4 * self._widths[name] ** 2
            if chosen and size > room:
                break
            chosen.append(name)
            room -= size
        return chosen


def _inverse_factor(moments_ii: torch.Tensor, dampening: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped moments' inverse, float32; dead inputs get the identity's row."""
    damped = moments_ii.double()
    mean = damped.diagonal().mean().clamp(min=1e-12)
    damped.diagonal().add_(dampening * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round_columns(weight_oi: torch.Tensor, scales_oi: torch.Tensor, factor_ii: torch.Tensor) -> torch.Tensor:
    """Codes [o, i]; `weight_oi` is used up. Later columns get a block's errors at once (GPTQ's lazy updates)."""
    book = codebook("nf4")
    values, thresholds = torch.from_numpy(book.values.copy()), torch.from_numpy(book.thresholds.copy())
    codes_oi = torch.empty(weight_oi.shape, dtype=torch.uint8)
    columns = weight_oi.shape[1]
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, columns)
        errors_oj = torch.empty(len(weight_oi), stop - start)
        for place in range(start, stop):
            scale = scales_oi[:, place]
            share = torch.where(scale == 0, 0.0, weight_oi[:, place] / scale)
            code = torch.bucketize(share, thresholds)
            codes_oi[:, place] = code.to(torch.uint8)
            error = (weight_oi[:, place] - values[code] * scale) / factor_ii[place, place]
            weight_oi[:, place:stop] -= error[:, None] * factor_ii[place, place:stop]
            errors_oj[:, place - start] = error
        weight_oi[:, stop:] -= errors_oj @ factor_ii[start:stop, stop:]
    return codes_oi


@contextmanager
def _hooks(model: PreTrainedModel, hooks: Mapping[str, Any]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
