"""A frozen linear layer with the adapters of several slots on it, each acting on its own rows.

    y = W x + bias,   then on the rows of slot k:   y += s_k (B_k A_k - B0_k A0_k) drop_k(x)

(Hu et al. 2021, section 4.1; B0 A0 is there for starts that are not zero.) Gradients of A and B are added straight to
the slot's flat buffers in the backward pass, so that no autograd node is needed for each of them; the gradient of x
goes back as usual. Dropout's factors are drawn again in the backward pass instead of being kept. A DoRA slot takes the
way of autograd. Knows nothing of how rows were laid out.

Shapes: N tokens of a pass, n of a slot's span, I in_features, O out_features, r rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from qlora_core.model.dense_weight import dense_weight
from qlora_core.training.pack.dropout import dropout_factors
from qlora_core.training.pack.factors import Factors
from qlora_core.training.pack.layout import Span

Work = tuple[Span, Factors, bool]


class PassState:
    """What every adapted layer of a pack asks for: the spans of the pass that runs now, and whether dropout is on.

    In a model of an encoder and a decoder, layers see the tokens of one or of the other.
    """

    def __init__(self) -> None:
        self.spans: Sequence[Span] = ()
        self.source_spans: Sequence[Span] = ()
        self.dropout = False
        # Autograd calls a function's backward only where an input wants a gradient; the first layer's x wants none
        self.anchor = torch.zeros((), requires_grad=True)

    def spans_of(self, x: torch.Tensor) -> Sequence[Span]:
        """The spans among the tokens of x: an encoder's if there are as many; with as many of both, they are equal."""
        source = self.source_spans
        return source if source and x.shape[:-1].numel() == source[-1].stop else self.spans


class PackedLoraLinear(torch.nn.Module):
    """`base_layer` and the factors of the slots that adapt it, by slot number."""

    def __init__(self, base_layer: torch.nn.Module, state: PassState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.state = state
        self.factors: dict[int, Factors] = {}

    @property
    def weight(self) -> Any:
        """The frozen weight, for code of transformers that asks a linear layer for it."""
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., I] whose leading axes hold the tokens of the pass in order; returns [..., O]."""
        y = self.base_layer(x)
        state = self.state
        plain: list[Work] = []
        for span in state.spans_of(x):
            factors = self.factors.get(span.slot)
            if factors is None:
                continue
            if factors.magnitude is None:
                plain.append((span, factors, state.dropout))
            else:
                y = self._dora(x, y, span, factors)
        return _AddDeltas.apply(y, x, state.anchor, plain) if plain else y

    def _dora(self, x: torch.Tensor, y: torch.Tensor, span: Span, factors: Factors) -> torch.Tensor:
        """DoRA (Liu et al. 2024, equation 5): y = (m / |W + s B A|) (W + s B A) x, the norm held constant (4.3)."""
        flat_x, flat_y = x.flatten(0, -2), y.flatten(0, -2)
        own_x = flat_x[span.start : span.stop]
        bias = getattr(self.base_layer, "bias", None)
        own_y = flat_y[span.start : span.stop]
        projected = own_y if bias is None else own_y - bias.to(own_y.dtype)
        if self.state.dropout and factors.dropout:
            own_x = own_x * _drop(span, factors, own_x)
            projected = self.base_layer(own_x)
            projected = projected if bias is None else projected - bias.to(projected.dtype)
        assert factors.magnitude is not None
        with torch.no_grad():
            weight = dense_weight(self.base_layer)
            norm = torch.linalg.vector_norm(weight + factors.scale * (factors.b @ factors.a).to(weight), dim=1)
        ratio = (factors.magnitude / norm.to(factors.magnitude)).to(x.dtype)
        low = linear(linear(own_x, factors.a.to(x.dtype)), factors.b.to(x.dtype))
        new = own_y + (ratio - 1) * projected + ratio * factors.scale * low
        return torch.cat([flat_y[: span.start], new, flat_y[span.stop :]]).view_as(y)


class _AddDeltas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, work: list[Work]) -> torch.Tensor:
        flat_x, flat_y = x.flatten(0, -2), y.view(-1, y.shape[-1])
        for span, factors, drops in work:
            own_x = _own_x(flat_x, span, factors, drops)
            own_y = flat_y[span.start : span.stop]
            for a, b, sign in _products(factors):
                own_y.addmm_(own_x @ a.to(own_x.dtype).T, b.to(own_x.dtype).T, alpha=sign * factors.scale)
        ctx.work = work
        ctx.save_for_backward(x)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = gradients
        (x,) = ctx.saved_tensors
        flat_x, flat_grad = x.flatten(0, -2), grad_y.flatten(0, -2)
        grad_x = torch.zeros_like(flat_x) if ctx.needs_input_grad[1] else None
        for span, factors, drops in ctx.work:
            into = None if grad_x is None else grad_x[span.start : span.stop]
            _add_gradients(flat_x, flat_grad[span.start : span.stop], into, span, factors, drops)
        return grad_y, None if grad_x is None else grad_x.view_as(x), None, None


def _add_gradients(
    flat_x: torch.Tensor, grad_y: torch.Tensor, grad_x: torch.Tensor | None, span: Span, factors: Factors, drops: bool
) -> None:
    """Add to the gradients of A, B and x what one slot's rows contribute: grad_y [n, O], grad_x [n, I] or unwanted."""
    own_x = _own_x(flat_x, span, factors, drops)
    for a, b, sign in _products(factors):
        a_x, scale = a.to(own_x.dtype), sign * factors.scale
        grad_low = (grad_y @ b.to(own_x.dtype)).mul_(scale)
        if a.requires_grad:
            assert a.grad is not None
            assert b.grad is not None
            a.grad.add_(grad_low.T @ own_x)
            b.grad.add_(grad_y.T @ (own_x @ a_x.T), alpha=scale)
        if grad_x is not None:
            grad_x.addmm_(grad_low, a_x)
    if grad_x is not None and drops and factors.dropout:
        grad_x.mul_(_drop(span, factors, grad_x))


def _products(factors: Factors) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    if factors.start is None:
        return [(factors.a, factors.b, 1.0)]
    return [(factors.a, factors.b, 1.0), (*factors.start, -1.0)]


def _own_x(flat_x: torch.Tensor, span: Span, factors: Factors, drops: bool) -> torch.Tensor:
    own = flat_x[span.start : span.stop]
    return own * _drop(span, factors, own) if drops and factors.dropout else own


def _drop(span: Span, factors: Factors, like: torch.Tensor) -> torch.Tensor:
    drawn = dropout_factors(span.tokens, span.rows, span.step, factors.key, like.shape[-1], factors.dropout)
    return drawn.to(like.dtype)
