"""A base with several adapters on it whose weights can be changed, and learned: one number each, or one a module.

Knows hooks and losses, not how weights are chosen. Shapes, as suffixes of names: k adapters, m modules, s columns (the
ranks of all adapters on a module), b rows, t tokens, v vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel

from qlora_core.adapters.adapter_folder import AdapterFolder
from qlora_core.evaluation.heldout import RowLoss
from qlora_core.model.perplexity import Window, document_losses

_PADDING_ID = 0  # any valid id does: the attention mask hides it


class _Columns(NamedTuple):
    """All adapters' factors on a module, a_si and b_so; `owner_s` says whose column each is, `place` which module."""

    a_si: torch.Tensor
    b_so: torch.Tensor
    owner_s: torch.Tensor
    place: int


class WeightedModel:
    """`weights_km`, [adapters, modules], multiplies each adapter's delta on each module; zero at first: the base."""

    def __init__(self, base: PreTrainedModel, adapters: Sequence[AdapterFolder]) -> None:
        self.base = base
        self.modules = sorted({module for adapter in adapters for module in adapter.modules})
        self.weights_km = torch.zeros(len(adapters), len(self.modules), device=base.device)
        self._handles = [
            base.get_submodule(module).register_forward_hook(partial(self._add, self._stack(adapters, place, module)))
            for place, module in enumerate(self.modules)
        ]

    def remove(self) -> None:
        """Take the adapters off the base."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def using(self, weights: torch.Tensor) -> Iterator[None]:
        """Inside the block the weights are these: [k], the same on every module, or [k, m]."""
        before = self.weights_km
        weights = weights.to(self.base.device)
        self.weights_km = weights[:, None].expand(-1, len(self.modules)) if weights.dim() == 1 else weights
        try:
            yield
        finally:
            self.weights_km = before

    def document_losses(self, weights: torch.Tensor, documents: Sequence[Sequence[int]]) -> list[RowLoss]:
        """Losses of documents of token ids at these weights."""
        with self.using(weights), torch.no_grad():
            scored = document_losses(self.base, documents)
        return [RowLoss(str(place), nats, count) for place, (nats, count) in enumerate(scored)]

    def mean_loss(self, weights: torch.Tensor, rows: Sequence[Window]) -> torch.Tensor:
        """Nats per counted token of a batch, with gradients to the weights."""
        ids_bt, mask_bt, target_bt = batch_of(rows, self.base.device)
        with self.using(weights):
            model: Any = self.base
            logits_btv = model(input_ids=ids_bt, attention_mask=mask_bt, use_cache=False).logits
        return cross_entropy(logits_btv[:, :-1].flatten(0, 1).float(), target_bt[:, 1:].flatten(), ignore_index=-100)

    def counted_logits(self, weights: torch.Tensor, rows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits [n, v] that predict a batch's counted tokens, in float64, and those tokens [n]."""
        ids_bt, mask_bt, target_bt = batch_of(rows, self.base.device)
        with self.using(weights), torch.no_grad():
            model: Any = self.base
            logits_btv = model(input_ids=ids_bt, attention_mask=mask_bt, use_cache=False).logits
        counted = target_bt[:, 1:] != -100
        return logits_btv[:, :-1][counted].double(), target_bt[:, 1:][counted]

    def _stack(self, adapters: Sequence[AdapterFolder], place: int, module: str) -> _Columns:
        here = [(k, adapter.factors(module)) for k, adapter in enumerate(adapters) if module in adapter.modules]
        device = self.base.device
        owner_s = torch.tensor([k for k, update in here for _ in range(update.rank)], device=device)
        a_si = torch.cat([update.a_ri for _, update in here]).to(device)
        b_so = torch.cat([update.b_or.T for _, update in here]).to(device)
        return _Columns(a_si, b_so, owner_s, place)

    def _add(
        self, columns: _Columns, module: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor
    ) -> torch.Tensor:
        hidden_bts = linear(args[0].float(), columns.a_si) * self.weights_km[columns.owner_s, columns.place]
        return y + (hidden_bts @ columns.b_so).to(y.dtype)


def batch_of(rows: Sequence[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and targets [b, t], padded on the right; a target that does not count is -100."""
    longest = max(len(row.input_ids) for row in rows)
    ids_bt = torch.full((len(rows), longest), _PADDING_ID)
    mask_bt, target_bt = torch.zeros_like(ids_bt), torch.full_like(ids_bt, -100)
    for place, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        ids_bt[place, : len(ids)], mask_bt[place, : len(ids)] = ids, 1
        target_bt[place, : len(ids)] = torch.where(torch.tensor(row.loss_mask), ids, -100)
    return ids_bt.to(device), mask_bt.to(device), target_bt.to(device)
