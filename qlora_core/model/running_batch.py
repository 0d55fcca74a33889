"""A batch that is never closed: rows join while others are being answered, each with its own adapter, and leave alone.

Rows are padded on the left to the longest of the batch, in their cached keys and values too; the attention mask hides
what is padding, and positions count a row's own tokens. So a row's logits do not depend on its neighbours beyond
rounding, nor on when it joined. Knows token ids and caches; knows nothing of sampling, texts or requests.

Shapes, as suffixes of names: b rows, t tokens with padding, v vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qlora_core.errors import ModelError
from qlora_core.model.adapter_set import AdapterSet, rows_of
from qlora_core.model.encoder_decoder import is_encoder_decoder

_PADDING_ID = 0  # any valid id does: the attention mask hides it
_JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer)


class RunningBatch:
    """The rows in hand over `model`, a base or an `AdapterSet`; empty at first.

    Every layer keeps all its keys and values, sliding windows too: the mask still hides what lies outside the window.

    Raises:
        ModelError: an encoder-decoder, a model that takes no `position_ids`, or one whose layers keep more than keys
            and values (state-space and linear attention): its rows could not be joined.
    """

    def __init__(self, model: PreTrainedModel | AdapterSet) -> None:
        self._model = model
        self._inner: Any = model.base if isinstance(model, AdapterSet) else model
        _check_joinable(self._inner)
        self._adapters: list[str | None] = []
        self._cache: Any = None
        self._attention_bt = torch.zeros((0, 0), dtype=torch.long)

    def __len__(self) -> int:
        return len(self._adapters)

    def join(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> torch.Tensor:
        """Put rows behind those in hand; returns the logits [new rows, vocabulary] that follow their last tokens.

        prompts: token ids, none empty. adapters: one each, None for the base.
        """
        if not prompts or not all(prompts):
            raise ModelError("rows that join a batch need at least one token each")
        longest = max(len(prompt) for prompt in prompts)
        ids_bt = torch.full((len(prompts), longest), _PADDING_ID, dtype=torch.long)
        attention_bt = torch.zeros((len(prompts), longest), dtype=torch.long)
        for place, prompt in enumerate(prompts):
            ids_bt[place, longest - len(prompt) :] = torch.tensor(list(prompt))
            attention_bt[place, longest - len(prompt) :] = 1
        attention_bt = attention_bt.to(self._inner.device)
        positions_bt = (attention_bt.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()
        logits_bv = self._forward(ids_bt, attention_bt, positions_bt, cache, adapters)
        self._append(cache, attention_bt)
        self._adapters += list(adapters)
        return logits_bv

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Every row's next token, in order; returns the logits [rows, vocabulary] that follow."""
        if len(tokens) != len(self._adapters) or not tokens:
            raise ModelError(f"{len(tokens)} tokens were given for {len(self._adapters)} rows; give one each")
        positions_bt = self._attention_bt.sum(-1, keepdim=True)
        self._attention_bt = pad(self._attention_bt, (0, 1), value=1)
        ids_bt = torch.tensor(list(tokens))[:, None]
        return self._forward(ids_bt, self._attention_bt, positions_bt, self._cache, self._adapters)

    def keep(self, places: Sequence[int]) -> None:
        """Let all rows but these go, in this order; padding that no row needs goes with them."""
        self._adapters = [self._adapters[place] for place in places]
        if not places:
            self._cache = None
            return
        kept_b = torch.tensor(list(places), device=self._inner.device)
        attention_bt = self._attention_bt[kept_b]
        spare = int(attention_bt.any(0).int().argmax())
        self._attention_bt = attention_bt[:, spare:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[kept_b, :, spare:]
            layer.values = layer.values[kept_b, :, spare:]

    def _forward(
        self,
        ids_bt: torch.Tensor,
        attention_bt: torch.Tensor,
        positions_bt: torch.Tensor,
        cache: Any,
        adapters: Sequence[str | None],
    ) -> torch.Tensor:
        with torch.inference_mode(), rows_of(self._model, adapters):
            return self._inner(
                input_ids=ids_bt.to(self._inner.device),
                attention_mask=attention_bt,
                position_ids=positions_bt,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def _append(self, cache: Any, attention_bt: torch.Tensor) -> None:
        if self._cache is None:
            self._cache, self._attention_bt = cache, attention_bt
            return
        width = max(self._attention_bt.shape[1], attention_bt.shape[1])
        self._attention_bt = torch.cat([_padded(each, width, -1) for each in (self._attention_bt, attention_bt)])
        for own, new in zip(self._cache.layers, cache.layers, strict=True):
            own.keys = torch.cat([_padded(each, width, -2) for each in (own.keys, new.keys)])
            own.values = torch.cat([_padded(each, width, -2) for each in (own.values, new.values)])


def _padded(value: torch.Tensor, width: int, axis: int) -> torch.Tensor:
    """Zeros before `value`, along its token axis (-1 or -2), until it is `width` long."""
    lacking = width - value.shape[axis]
    return pad(value, (lacking, 0) if axis == -1 else (0, 0, lacking, 0)) if lacking else value


def _check_joinable(model: Any) -> None:
    name = type(model).__name__
    if is_encoder_decoder(model):
        raise ModelError(f"{name} has an encoder and a decoder; only decoders can be answered in a running batch")
    lacking = {"position_ids", "logits_to_keep"} - set(inspect.signature(model.forward).parameters)
    if lacking:
        raise ModelError(f"{name} takes no {' and no '.join(sorted(lacking))}, so its rows cannot join a running batch")
    odd = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers if type(layer) not in _JOINABLE}
    if odd:
        raise ModelError(f"{name} keeps {', '.join(sorted(odd))} beside keys and values; its rows cannot be joined")
