"""Adapters in slots on one frozen base: put on, trained in common passes, taken off without a trace.

A slot can be filled, freed and filled again while the others go on. Knows nothing of schedules, data order or files.
Shapes: P predicted positions of a pass, V vocabulary.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.model.document_attention import document_attention, keeps_documents_apart
from qlora_core.training.pack.factors import Residuals, SlotWeights
from qlora_core.training.pack.layout import Layout, Part, Span, lay_out
from qlora_core.training.pack.lora_linear import PackedLoraLinear, PassState
from qlora_core.training.preference import loss_sum, row_log_probs


class Pack:
    """The slots on one base. `base` is changed in place while a slot is filled, and is as it was when all are free.

    Rows lie end to end where the base keeps documents apart, and are padded under each other where it does not.
    `most_together`: how many slots memory has room for in a pass, None as long as it was enough.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.end_to_end = keeps_documents_apart(base)
        self.most_together: int | None = None
        self._state = PassState()
        self._layers: dict[str, PackedLoraLinear] = {}
        self._slots: dict[int, SlotWeights] = {}

    def fill(self, config: LoraConfig, seed: int, residuals: Residuals | None = None) -> int:
        """Put a fresh adapter on the base; returns its slot. `config.target_modules` are name endings that exist.

        `residuals`: begin from what quantization took, see `SlotWeights`. Equal seeds give equal weights, whatever else
        is in the pack. Weights are float32, or wider over a wider base.
        """
        names = _matching(self.base, config.target_modules or ())
        modules = {name: self._linear(name) for name in names}
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        weights = SlotWeights(modules, config, seed, dtype, residuals)
        slot = next(number for number in range(len(self._slots) + 1) if number not in self._slots)
        self._slots[slot] = weights
        for name, factors in weights.factors.items():
            self._layer(name).factors[slot] = factors
        return slot

    def free(self, slot: int) -> None:
        """Take a slot's adapter off; layers that no other slot adapts are the base's own again."""
        for name in self._slots.pop(slot).factors:
            layer = self._layers[name]
            del layer.factors[slot]
            if not layer.factors:
                _replace(self.base, name, layer.base_layer)
                del self._layers[name]

    def weights(self, slot: int) -> SlotWeights:
        """The adapter in a slot."""
        return self._slots[slot]

    def backward(self, parts: Sequence[Part], divisors: Sequence[int], *, dropout: bool = True) -> torch.Tensor:
        """Add to every slot's gradient that of (its part's loss sum) / (its entry of `divisors`); returns the sums.

        Summed is -ln p over trained tokens, or the loss over preference pairs where the part holds these. The sums are
        detached, [parts], on the base's device, finite or not. Checkpointed layers run again in here, so the whole pass
        is one call.
        """
        layout = lay_out(parts, self.base, end_to_end=self.end_to_end)
        with self._pass(layout.spans, layout.source_spans, dropout=dropout), self._attention():
            nats_P = self._nats(layout)
            sums = torch.stack(
                [
                    loss_sum(nats_P[start:stop], part.rows, part.pairs)
                    for part, (start, stop) in zip(parts, layout.bounds, strict=True)
                ]
            )
            weights = torch.tensor([1 / count for count in divisors], dtype=sums.dtype, device=sums.device)
            if sums.requires_grad:
                (sums * weights).sum().backward()
        return sums.detach()

    @torch.no_grad()
    def base_log_probs(self, rows: Sequence[TokenRow]) -> torch.Tensor:
        """ln p of each row's trained tokens under the base alone, whatever is in the slots: float64 [rows]."""
        layout = lay_out([Part(_NOBODY, rows, 0, 0)], self.base, end_to_end=self.end_to_end)
        with self._pass(()), self._attention():
            return row_log_probs(self._nats(layout), rows)

    @contextmanager
    def only(self, slot: int) -> Iterator[None]:
        """While the block runs, plain calls of the base answer with this slot's adapter on every row."""
        nowhere = torch.empty(0, dtype=torch.long)
        with self._pass((Span(slot, 0, _EVERYTHING, 0, nowhere, nowhere),)):
            yield

    def _attention(self) -> AbstractContextManager[None]:
        return document_attention(self.base) if self.end_to_end else nullcontext()

    @contextmanager
    def _pass(
        self, spans: Sequence[Span], source_spans: Sequence[Span] = (), *, dropout: bool = False
    ) -> Iterator[None]:
        state = self._state
        before = (state.spans, state.source_spans, state.dropout)
        state.spans, state.source_spans, state.dropout = spans, source_spans, dropout
        try:
            yield
        finally:
            state.spans, state.source_spans, state.dropout = before

    def _nats(self, layout: Layout) -> torch.Tensor:
        """-ln p of every label, [P]."""
        options: dict[str, Any] = {}
        flat = layout.end_to_end and _keeps_logits(type(self.base))
        if flat:
            options["logits_to_keep"] = layout.kept
        logits = self.base(**layout.inputs, **options).logits
        logits_PV = logits.flatten(0, 1) if flat else logits.flatten(0, 1)[layout.kept]
        if logits_PV.dtype.itemsize == 2:
            logits_PV = logits_PV.float()
        return functional.cross_entropy(logits_PV, layout.labels, reduction="none")

    def _linear(self, name: str) -> torch.nn.Module:
        layer = self._layers.get(name)
        return self.base.get_submodule(name) if layer is None else layer.base_layer

    def _layer(self, name: str) -> PackedLoraLinear:
        if name not in self._layers:
            self._layers[name] = PackedLoraLinear(self.base.get_submodule(name), self._state)
            _replace(self.base, name, self._layers[name])
        return self._layers[name]


_EVERYTHING = 1 << 62
_NOBODY = -1


def linear_names(base: PreTrainedModel) -> list[str]:
    """Every linear layer that can carry an adapter, or does, in the model's order; the output head stays as it is."""
    head = base.get_output_embeddings()
    adapted = {name for name, module in base.named_modules() if isinstance(module, PackedLoraLinear)}
    return [
        name
        for name, module in base.named_modules()
        if name in adapted
        or (
            isinstance(module, torch.nn.Linear)
            and module is not head
            and name.removesuffix(".base_layer") not in adapted
        )
    ]


def _matching(base: PreTrainedModel, targets: Any) -> list[str]:
    endings = [targets] if isinstance(targets, str) else sorted(targets)
    names = linear_names(base)
    chosen = [name for name in names if any(name == end or name.endswith(f".{end}") for end in endings)]
    if not chosen:
        existing = sorted({name.rpartition(".")[2] for name in names})
        raise TrainingError(f"target_modules {endings} match no linear layer of the base; it has {', '.join(existing)}")
    return chosen


def _replace(base: PreTrainedModel, name: str, module: torch.nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(base.get_submodule(parent), own, module)


@functools.cache
def _keeps_logits(model_class: type[PreTrainedModel]) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
