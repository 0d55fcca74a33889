"""Several LoRA adapters at once over one frozen base: each row of a batch has its own adapter, or none.

The base's modules stay as they are; each target gets a forward hook that adds the rows' adapters to its output. On rows
x of a module, with the A of all adapters stacked to [S, in] and their scaled B to [S, out] (S: the sum of the ranks),

    y += where(own, x A^T, 0) B

where `own` says which of the S columns belong to the row's adapter. Two products serve any number of adapters and ranks
without padding. What a foreign adapter makes of a row, infinity included, is replaced by 0, not multiplied by it. That
is S / r times the arithmetic of one adapter of rank r, little beside the base: S (in + out) against in * out.

For inference only. Knows PEFT's folders through `adapter`; knows nothing of prompts, tokens or metrics.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qlora_core.errors import ModelError
from qlora_core.model.adapter import magnitude_name, read_fitting_adapter, target_modules_of, tensor_names
from qlora_core.model.dense_weight import dense_weight


class NamedAdapter(NamedTuple):
    """A PEFT folder and the name that rows give to have it."""

    name: str
    folder: Path


class _Share(NamedTuple):
    """One adapter's factors on one module: a_ri [r, in], b_ro [r, out] with the scale in it; float32.

    `gain_o`: what DoRA multiplies the base's own product by (it is in b_ro too); None for plain LoRA.
    """

    adapter: str
    a_ri: torch.Tensor
    b_ro: torch.Tensor
    gain_o: torch.Tensor | None


class _Columns(NamedTuple):
    """One adapter's share of a module's S columns."""

    adapter: str
    start: int
    stop: int


class _Selection(NamedTuple):
    """What the present rows use of a layout: columns start to stop, and of those the ones that are not their own.

    `foreign_b1s`: [rows, 1, stop - start], None where all rows own every column in the range.
    """

    start: int
    stop: int
    foreign_b1s: torch.Tensor | None


class _Target(NamedTuple):
    """All adapters' factors on one module, a_si [S, in] and b_so [S, out], and whose columns are whose.

    They are float32, as in PEFT, whatever the base computes in. `gains`: DoRA's, [out], by adapter.
    """

    a_si: torch.Tensor
    b_so: torch.Tensor
    layout: tuple[_Columns, ...]
    gains: dict[str, torch.Tensor]


class AdapterSet:
    """Adapters in place on `base`; outside a `rows` block the base computes as if they were not there."""

    def __init__(self, base: PreTrainedModel, names: Sequence[str], targets: dict[str, _Target]) -> None:
        self.base = base
        self.names = tuple(names)
        self._targets: dict[str, _Target] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._layouts: set[tuple[_Columns, ...]] = set()
        self._rows: list[str | None] | None = None
        self._selections: dict[tuple[_Columns, ...], _Selection | None] = {}
        self._put(targets)

    @contextmanager
    def rows(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Inside the block, row i of every batch given to `base` has the adapter named `adapters[i]`; None: the base.

        Raises:
            ModelError: a name is not in the set, or a batch comes with another number of rows.
        """
        self.check(adapters)
        before = self._rows
        self._select(list(adapters))
        try:
            yield
        finally:
            self._select(before)

    def keep(self, places: Sequence[int]) -> None:
        """Inside a `rows` block: from here on batches hold only these of the present rows, in this order."""
        if self._rows is None:
            raise ModelError("rows can be kept only inside a rows block")
        self._select([self._rows[place] for place in places])

    def check(self, adapters: Sequence[str | None]) -> None:
        """Raises ModelError at the first name that is not in the set."""
        for name in adapters:
            if name is not None and name not in self.names:
                raise ModelError(
                    f"no adapter is named {name!r} here; there are {', '.join(self.names)} (None: the base)"
                )

    def add(self, adapter: NamedAdapter, *, expected_base_digest: str | None = None) -> None:
        """Put one more adapter on, between batches; the others' answers stay what they are.

        Raises:
            ModelError: a name that is in the set, a `rows` block is open, or what `attach_adapter` refuses; the set is
                as it was then.
        """
        self._check_between_batches()
        _check_names([*self.names, adapter.name])
        device, targets = self.base.device, {}
        for module, share in _read_shares(self.base, adapter, expected_base_digest):
            before = _shares_of(self._targets[module]) if module in self._targets else []
            targets[module] = _stack([*before, share], device)
        self._put(targets)
        self.names = (*self.names, adapter.name)

    def drop(self, name: str) -> None:
        """Take one adapter off, between batches.

        Raises:
            ModelError: the name is not in the set, or a `rows` block is open.
        """
        self._check_between_batches()
        self.check([name])
        targets: dict[str, _Target | None] = {}
        for module, target in self._targets.items():
            left = [share for share in _shares_of(target) if share.adapter != name]
            if len(left) < len(target.layout):
                targets[module] = _stack(left, self.base.device) if left else None
        self._put(targets)
        self.names = tuple(each for each in self.names if each != name)

    def remove(self) -> None:
        """Take the adapters off; the base is as it was before."""
        self._put(dict.fromkeys(self._targets))

    def _put(self, targets: Mapping[str, _Target | None]) -> None:
        """Modules' factors in place of those they had; None: the module is the base's own again."""
        for name, target in targets.items():
            if name in self._hooks:
                self._hooks.pop(name).remove()
                del self._targets[name]
            if target is not None:
                module = self.base.get_submodule(name)
                self._hooks[name] = module.register_forward_hook(partial(self._add, name, target))
                self._targets[name] = target
        self._layouts = {target.layout for target in self._targets.values()}

    def _check_between_batches(self) -> None:
        if self._rows is not None:
            raise ModelError("adapters come and go between batches; leave the rows block first")

    def _select(self, rows: list[str | None] | None) -> None:
        self._rows = rows
        self._selections = {} if rows is None else {layout: self._selection(layout, rows) for layout in self._layouts}

    def _selection(self, layout: tuple[_Columns, ...], rows: Sequence[str | None]) -> _Selection | None:
        """None where no row has an adapter on the modules of this layout."""
        used = [columns for columns in layout if columns.adapter in rows]
        if not used:
            return None
        start, stop = used[0].start, used[-1].stop
        foreign_b1s = torch.ones((len(rows), 1, stop - start), dtype=torch.bool)
        own = {columns.adapter: columns for columns in used}
        for place, name in enumerate(rows):
            if name in own:
                foreign_b1s[place, 0, own[name].start - start : own[name].stop - start] = False
        return _Selection(start, stop, foreign_b1s.to(self.base.device) if foreign_b1s.any() else None)

    def _add(
        self, name: str, target: _Target, module: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor
    ) -> torch.Tensor:
        selection = self._selections.get(target.layout)
        if self._rows is None:
            return y
        x = args[0]
        if x.dim() != 3 or len(x) != len(self._rows):
            raise ModelError(
                f"{name} was given {list(x.shape)}, not [{len(self._rows)}, tokens, {target.a_si.shape[1]}]: its rows "
                "cannot be told apart; give one adapter per row, and only to models whose layers keep rows apart"
            )
        if selection is None:
            return y
        start, stop, foreign_b1s = selection
        hidden_bts = linear(x.to(target.a_si.dtype), target.a_si[start:stop])
        if foreign_b1s is not None:
            hidden_bts.masked_fill_(foreign_b1s, 0)
        delta = torch.matmul(hidden_bts, target.b_so[start:stop])
        return self._with_gains(target, module, y) + delta.to(y.dtype)

    def _with_gains(self, target: _Target, module: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        """W x times the gain of each row's adapter; the bias has none (Liu et al. 2024, equation 5)."""
        if not target.gains or self._rows is None:
            return y
        none = torch.ones(y.shape[-1], device=y.device)
        gains = [none if name is None else target.gains.get(name, none) for name in self._rows]
        bias = getattr(module, "bias", None)
        product = y if bias is None else y - bias.to(y.dtype)
        return y + (torch.stack(gains)[:, None] - 1).to(y.dtype) * product


@contextmanager
def attached_adapters(
    base: PreTrainedModel, adapters: Sequence[NamedAdapter], *, expected_base_digest: str | None = None
) -> Iterator[AdapterSet]:
    """The adapters of PEFT folders on `base` while the block runs; ranks, scales and targets may differ.

    They are held in float32 on the base's device. `expected_base_digest`: see `attach_adapter`.

    Raises:
        ModelError: no adapter, a name given twice, a base that carries PEFT's layers already, or what `attach_adapter`
            refuses in a folder; nothing was put on the base then.
    """
    _check_names([adapter.name for adapter in adapters])
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ModelError("the base has an adapter of PEFT's on it; take that off with unload(), or load the base anew")
    shares: dict[str, list[_Share]] = defaultdict(list)
    for adapter in adapters:
        for module, share in _read_shares(base, adapter, expected_base_digest):
            shares[module].append(share)
    targets = {module: _stack(of_module, base.device) for module, of_module in shares.items()}
    attached = AdapterSet(base, [adapter.name for adapter in adapters], targets)
    try:
        yield attached
    finally:
        attached.remove()


def adapters_of_rows(model: object, adapters: Sequence[str | None] | None, count: int) -> list[str | None]:
    """The adapter of each of `count` rows that `model` is given: None for all where `adapters` is None.

    Raises:
        ModelError: they are not `count`, a name is unknown, or `model` is no `AdapterSet` and cannot choose.
    """
    if adapters is None:
        return [None] * count
    if not isinstance(model, AdapterSet):
        raise ModelError("adapters can be named per row only for an AdapterSet; load them with attached_adapters")
    if len(adapters) != count:
        raise ModelError(f"{len(adapters)} adapters are named for {count} rows; name one per row, None for the base")
    model.check(adapters)
    return list(adapters)


@contextmanager
def rows_of(model: object, adapters: Sequence[str | None]) -> Iterator[Callable[[Sequence[int]], None]]:
    """`AdapterSet.rows` and its `keep` where `model` is one; any other model gives every row what it has."""
    if not isinstance(model, AdapterSet):
        yield lambda places: None
        return
    with model.rows(adapters):
        yield model.keep


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ModelError("no adapter was given; name at least one PEFT folder, or use the base as it is")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ModelError(f"adapter name {twice[0]!r} is given twice; a row could not say which it means: rename one")


def _read_shares(
    base: PreTrainedModel, adapter: NamedAdapter, expected_base_digest: str | None
) -> Iterator[tuple[str, _Share]]:
    """Module by module, the factors of one adapter, the scale in B."""
    config, tensors = read_fitting_adapter(base, adapter.folder, expected_base_digest=expected_base_digest)
    for module in target_modules_of(tensors):
        a_name, b_name = tensor_names(module)
        b_ro = tensors[b_name].float().t() * lora_scale(config, module)
        if not torch.isfinite(b_ro).all():
            raise ModelError(
                f"{adapter.folder}: {b_name} times lora_alpha / r is beyond float32; train the adapter again with a "
                "lower learning rate"
            )
        a_ri, gain_o = tensors[a_name].float(), None
        if config.use_dora:
            gain_o = _dora_gain(base.get_submodule(module), a_ri, b_ro, tensors[magnitude_name(module)].float())
            b_ro = b_ro * gain_o
        yield module, _Share(adapter.name, a_ri, b_ro, gain_o)


def _dora_gain(
    module: torch.nn.Module, a_ri: torch.Tensor, b_ro: torch.Tensor, magnitude_o: torch.Tensor
) -> torch.Tensor:
    """m / |W + s B A|, over each output's weights, [out]."""
    weight_oi = dense_weight(module).cpu()
    norm_o = torch.linalg.vector_norm(weight_oi + (b_ro.t() @ a_ri).to(weight_oi), dim=1)
    return (magnitude_o / norm_o).float()


def lora_scale(config: LoraConfig, module: str) -> float:
    """PEFT's scale of one module: alpha / r, or alpha / sqrt(r) with rsLoRA; patterns may set both per module."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _shares_of(target: _Target) -> list[_Share]:
    """Each adapter's factors on a module again, where they are."""
    return [
        _Share(name, target.a_si[start:stop], target.b_so[start:stop], target.gains.get(name))
        for name, start, stop in target.layout
    ]


def _stack(shares: Sequence[_Share], device: torch.device) -> _Target:
    """The factors side by side on the device; a copy of its own, even of one."""
    layout, start = [], 0
    for share in shares:
        stop = start + len(share.a_ri)
        layout.append(_Columns(share.adapter, start, stop))
        start = stop
    a_si = torch.cat([share.a_ri.to(device) for share in shares])
    b_so = torch.cat([share.b_ro.to(device) for share in shares])
    gains = {share.adapter: share.gain_o.to(device) for share in shares if share.gain_o is not None}
    return _Target(a_si, b_so, tuple(layout), gains)
