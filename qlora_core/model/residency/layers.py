"""The ways a bitsandbytes Linear4bit can execute, as subclasses that are put in its place. Knows no plan and no model.

All keep the stored codes, so names, `state_dict`, `save_pretrained` and PEFT's isinstance checks are those of
bitsandbytes. All compute y = x W^T + bias and, W being frozen, dx = dy W alone, with the same operators on the same
values: on the CPU in float32 they agree to the bit.

bitsandbytes 0.50.2 computes wrong values on CPUs with AVX-512 where blocks cross rows (see `quantization.dequantize`),
so there its own layer is replaced by one that allocates as it does and is right.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from qlora_core.errors import ModelError
from qlora_core.model.residency.panels import product, uses_panels
from qlora_core.model.residency.scratch import Scratch, shared_scratch
from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, from_bitsandbytes
from qlora_core.quantization.dequantize import blocks_cross_rows, dequantize_exact
from qlora_core.quantization.panels import Axis

Residency = Literal["dense", "scratch", "bitsandbytes"]
BITSANDBYTES_TYPES = ("nf4", "fp4")


class ResidentLinear4bit(Linear4bit):
    """What the ways have in common. `set_residency` makes it from a layer whose weight is quantized."""

    residency: ClassVar[Residency]
    stored_dtype: torch.dtype
    compute_dtype: torch.dtype
    _held: tuple[Params4bit, QuantizedTensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] in any float dtype; returns [..., out_features] in the same."""
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _FrozenLinear.apply(x.to(dtype), bias, self).to(x.dtype)

    def prepare(self) -> None:
        """Take what memory this way needs."""

    def stored(self) -> QuantizedTensor:
        """The layer's codes and constants; taken anew after the weight was moved or another one put in its place."""
        weight: Any = self.weight
        if self._held is None or self._held[0] is not weight:
            stored = from_bitsandbytes(weight.data, weight.quant_state)
            self._weight_changed(stored)
            self._held = (weight, stored)  # last: another thread that finds it may use what was made of it
        return self._held[1]

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + bias, x [..., in_features] in the dtype it is computed in."""
        with self._weight_in(x.dtype) as weight:
            return linear(x, weight, bias)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """dy W, dy [..., out_features] in the dtype of the product."""
        with self._weight_in(dy.dtype) as weight:
            return torch.matmul(dy, weight)

    def _weight_in(self, dtype: torch.dtype) -> AbstractContextManager[torch.Tensor]:
        """The weight [out_features, in_features], for products that are started within the block."""
        raise NotImplementedError

    def _weight_changed(self, stored: QuantizedTensor) -> None:
        """What the way keeps of the weight is made anew."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ResidentLinear4bit":
        self._held = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self._held = None  # codes may have been written in place

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        state = _quant_state(self)
        computed_in, state.dtype = state.dtype, self.stored_dtype
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            state.dtype = computed_in

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_held"}


class DenseLinear4bit(ResidentLinear4bit):
    """The weight is dequantized once and kept beside the codes, in a buffer that is in no `state_dict`.

    The buffer is taken at once and filled for the first product: loading stays as fast as it is for the other ways.
    """

    residency = "dense"
    dense_weight: torch.Tensor

    def prepare(self) -> None:
        """Take the memory of the weight."""
        state = _quant_state(self)
        with torch.inference_mode(False):
            dense = torch.empty(state.shape, dtype=self.compute_dtype, device=self.weight.device)
        self.register_buffer("dense_weight", dense, persistent=False)

    def _weight_changed(self, stored: QuantizedTensor) -> None:
        kept = self.dense_weight
        if (kept.shape, kept.dtype, kept.device) != (stored.shape, self.compute_dtype, stored.codes.device):
            self.prepare()  # the layer was cast, or has got a weight on another device
        dequantize_into(stored, self.dense_weight)

    def _weight_in(self, dtype: torch.dtype) -> AbstractContextManager[torch.Tensor]:
        self.stored()
        return nullcontext(self.dense_weight)


class ScratchLinear4bit(ResidentLinear4bit):
    """The weight is dequantized into the shared scratch for each product, forward and again backward.

    On a CPU it is for few rows not dequantized whole, see `residency.panels`.
    """

    residency = "scratch"
    scratch: Scratch

    def prepare(self) -> None:
        """Reserve the scratch for this layer, so that memory is taken now and not in the first step."""
        self.scratch = shared_scratch()
        stored = self.stored()
        self.scratch.reserve(math.prod(stored.shape), stored.codes.device, self.compute_dtype)

    def _weight_in(self, dtype: torch.dtype) -> AbstractContextManager[torch.Tensor]:
        return self.scratch.holding(self.stored(), dtype)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As for every way, by panels of rows where that pays."""
        found = self._by_panels(x, "rows", bias)
        return super().product(x, bias) if found is None else found

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """As for every way, by panels of columns where that pays."""
        found = self._by_panels(dy, "columns", None)
        return super().input_gradient(dy) if found is None else found

    def _by_panels(self, x: torch.Tensor, axis: Axis, bias: torch.Tensor | None) -> torch.Tensor | None:
        if x.device.type != "cpu":
            return None
        stored = self.stored()
        buffer = self.scratch.reserve(math.prod(stored.shape), x.device, x.dtype)
        if not uses_panels(stored, x, axis, buffer):
            return None
        return product(x, stored, axis, buffer, bias)


class BitsandbytesLinear4bit(ResidentLinear4bit):
    """bitsandbytes' own operators, which allocate a weight for every product, or compute from the codes on GPUs."""

    residency = "bitsandbytes"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] in any float dtype; returns [..., out_features] in the same."""
        if x.device.type == "cpu" and blocks_cross_rows(_quant_state(self)):
            return super().forward(x)
        return Linear4bit.forward(self, x)

    def _weight_in(self, dtype: torch.dtype) -> AbstractContextManager[torch.Tensor]:
        weight: Any = self.weight
        return nullcontext(dequantize_exact(weight.data, weight.quant_state, dtype))


class _FrozenLinear(torch.autograd.Function):
    """Asks the layer for both products, and saves neither its weight nor x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: ResidentLinear4bit) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x, bias)

    @staticmethod
    @once_differentiable  # a second derivative would need the weight once more, which is overwritten by then
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the parameters' names
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        dy, dx = gradients[0], None
        if ctx.needs_input_grad[0]:
            dx = ctx.layer.input_gradient(dy)
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None


LAYERS: Mapping[Residency, type[ResidentLinear4bit]] = {
    layer.residency: layer for layer in (DenseLinear4bit, ScratchLinear4bit, BitsandbytesLinear4bit)
}


def set_residency(layer: Linear4bit, residency: Residency, dtype: torch.dtype) -> None:
    """Let a quantized layer execute in this way and compute in `dtype`, from now on; the layer is changed in place.

    Raises:
        ModelError: bitsandbytes has no kernels for the layer's type.
    """
    state = _quant_state(layer)
    if residency == "bitsandbytes" and state.quant_type not in BITSANDBYTES_TYPES:
        raise ModelError(
            f"bitsandbytes has no kernels for {state.quant_type}, only for {' and '.join(BITSANDBYTES_TYPES)}; set "
            "compute.residency to auto, dense or scratch"
        )
    stored_dtype = layer.stored_dtype if isinstance(layer, ResidentLinear4bit) else state.dtype
    for name in ("_held", "dense_weight", "scratch"):
        if name in layer.__dict__ or name in layer._buffers:
            delattr(layer, name)
    layer.__class__ = LAYERS[residency]  # in place: name, parameters and whoever holds the module stay as they are
    resident: Any = layer
    resident.stored_dtype = stored_dtype
    resident.compute_dtype, resident.compute_type_is_set = dtype, True
    # bitsandbytes' backward pass dequantizes to the state's dtype, its forward pass to the input's: they must be one
    state.dtype = dtype
    # On CPUs with AVX512-BF16 bitsandbytes would repack the weights in place at the first evaluation and compute in
    # bf16 with bf16 absmax from then on (and fail on layers whose width is no multiple of 32)
    resident.support_avx512bf16_for_cpu = False
    resident.prepare()


def _quant_state(layer: Linear4bit) -> Any:
    return layer.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
