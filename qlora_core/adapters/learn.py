"""Weights of a composition, learned on validation rows and judged once on test rows.

A ladder, each rung the start of the next: (1) closed form: with logits taken as linear in the weights around the
uniform average, the loss is convex in w, and one Newton step from there needs the activations of k + 1 passes; (2) Adam
on k numbers, with an L1 price and a trust region around the start; (3) the same per module, kept only where held-back
validation rows show it beyond chance. Adapters that are copies of another, or worth nothing, are dropped on the way.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qlora_core.adapters.adapter_folder import AdapterFolder
from qlora_core.adapters.ingredient import Ingredient
from qlora_core.adapters.low_rank import inner
from qlora_core.adapters.weighted_model import WeightedModel
from qlora_core.config.recipe import LearnConfig
from qlora_core.errors import DataError
from qlora_core.evaluation.heldout import RowLoss, compare_losses
from qlora_core.model.base import load_any
from qlora_core.model.loss import max_positions_of
from qlora_core.model.perplexity import Window, checked_window, encode_documents, read_text, split_windows

COPY_COSINE = 0.99
"""Deltas nearer than this are one adapter twice; cosines below it are shown and decide nothing."""
_BATCH_ROWS = 16
_RIDGE = 1e-3
_CONFIDENCE = 0.95
_RESAMPLES = 1000


@dataclass(frozen=True)
class Learned:
    """The adapters with their learned weights, dropped ones at 0, and the report."""

    ingredients: list[Ingredient]
    report: dict[str, Any]


@dataclass(frozen=True)
class _Rows:
    """Validation windows to fit on, documents held back to decide on, and test documents, as token ids."""

    fit: list[Window]
    check: list[list[int]]
    test: list[list[int]]


def learn_weights(base: Path, ingredients: Sequence[Ingredient], config: LearnConfig, folder: Path) -> Learned:
    """Climb the ladder up to `config.level`; texts' relative paths start at `folder`.

    The report: `level` that was kept, `weights`, `by_module` (or None), `dropped` {name: why}, `test` {`loss`,
    `tokens`, `against`: {rival: loss, gain with interval}} for base, each adapter alone, uniform sum, uniform average
    and weights set by hand, `leave_one_out` {name: loss without it less loss with it, with interval}, `cosines`,
    `seconds`.

    Raises:
        DataError: a text of too few documents. ModelError: see `open_adapter`.
    """
    started = time.monotonic()
    model = WeightedModel(load_any(base), [each.adapter for each in ingredients])
    try:
        rows = _read_rows(base, config, folder, max_positions_of(model.base))
        climbed = _Ladder(model, ingredients, config, rows).climb()
        report = climbed.report | _judge(model, ingredients, climbed.weights, rows.test)
    finally:
        model.remove()
    weights = climbed.weights if climbed.weights.dim() == 1 else climbed.weights.mean(dim=1)
    by_module = None if climbed.weights.dim() == 1 else climbed.weights
    learned = [
        replace(
            each,
            weight=weights[k].item(),
            by_module=None if by_module is None else dict(zip(model.modules, by_module[k].tolist(), strict=True)),
        )
        for k, each in enumerate(ingredients)
    ]
    return Learned(learned, {**report, "seconds": round(time.monotonic() - started, 2)})


@dataclass(frozen=True)
class _Climbed:
    weights: torch.Tensor
    report: dict[str, Any]


class _Ladder:
    def __init__(
        self, model: WeightedModel, ingredients: Sequence[Ingredient], config: LearnConfig, rows: _Rows
    ) -> None:
        self._model, self._ingredients, self._config, self._rows = model, ingredients, config, rows
        self._dropped: dict[str, str] = {}

    def climb(self) -> _Climbed:
        """The weights, [k] or [k, m], and what is to be told of them."""
        names = [each.name for each in self._ingredients]
        cosines = delta_cosines([each.adapter for each in self._ingredients])
        kept = self._without_copies(cosines)
        start = closed_form(self._model, self._rows.fit, kept)
        weights, level = start, "closed_form"
        if self._config.level != "closed_form":
            weights = self._refine(start, kept)
            kept = self._without_useless(weights, kept)
            weights, level = self._refine(start * kept, kept), "scalars"
        else:
            kept = self._without_useless(weights, kept)
            weights = closed_form(self._model, self._rows.fit, kept)
        scalars = weights
        decided = None
        if self._config.level == "modules":
            finer = self._refine(weights[:, None].repeat(1, len(self._model.modules)), kept)
            decided = _compare(self._losses(weights), self._losses(finer))
            if decided["gain_low"] > 0:
                weights, level = finer, "modules"
        report = {
            "level": level,
            "weights": dict(zip(names, scalars.tolist(), strict=True)),
            "closed_form": dict(zip(names, start.tolist(), strict=True)),
            "by_module": None if weights.dim() == 1 else dict(zip(names, weights.tolist(), strict=True)),
            "modules_against_scalars": decided,
            "dropped": dict(self._dropped),
            "cosines": cosines,
        }
        return _Climbed(weights, report)

    def _without_copies(self, cosines: list[list[float]]) -> torch.Tensor:
        """1 for adapters that stay, 0 for a copy of an earlier one, [k]."""
        kept = torch.ones(len(cosines))
        for k, row in enumerate(cosines):
            twin = next((j for j in range(k) if kept[j] and row[j] >= COPY_COSINE), None)
            if twin is not None:
                kept[k] = 0
                name = self._ingredients[twin].name
                self._dropped[self._ingredients[k].name] = f"a copy of {name} (cosine {row[twin]:.4f})"
        return kept

    def _without_useless(self, weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The least useful first, as long as held-back rows lose less than `drop_below` by it; the best one stays."""
        kept = kept.clone()
        while kept.sum() > 1:
            whole = _mean(self._losses(weights * kept))
            costs = {}
            for k in kept.nonzero().flatten().tolist():
                less = kept.clone()
                less[k] = 0
                costs[k] = _mean(self._losses(weights * less)) - whole
            k = min(costs, key=lambda k: costs[k])
            if costs[k] >= self._config.drop_below:
                break
            kept[k] = 0
            self._dropped[self._ingredients[k].name] = f"worth {costs[k]:.4f} nats per token on held-back rows"
        return kept

    def _refine(self, start: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Adam from `start`, [k] or [k, m]; a weight stays within `trust_radius` of it, and a dropped one at 0."""
        mask = kept if start.dim() == 1 else kept[:, None]
        weights = (start * mask).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([weights], lr=self._config.learning_rate)
        batches = [self._rows.fit[at : at + _BATCH_ROWS] for at in range(0, len(self._rows.fit), _BATCH_ROWS)]
        share = 1 if start.dim() == 1 else start.shape[1]
        for step in range(self._config.steps):
            optimizer.zero_grad()
            loss = self._model.mean_loss(weights, batches[step % len(batches)])
            (loss + self._config.l1 * weights.abs().sum() / share).backward()
            optimizer.step()
            with torch.no_grad():
                radius = self._config.trust_radius
                weights.copy_(weights.clamp(start - radius, start + radius) * mask)
        return weights.detach()

    def _losses(self, weights: torch.Tensor) -> list[RowLoss]:
        return self._model.document_losses(weights, self._rows.check)


def closed_form(model: WeightedModel, rows: Sequence[Window], kept: torch.Tensor) -> torch.Tensor:
    """The Newton step w = u - (H + ridge)^-1 g from the uniform average u of those in `kept`, clipped to [0, 1.5].

    Shapes [k]; 0 where `kept` is. With z the logits at u and d_k = (z - z without adapter k) / u_k, logits are taken as
    z + sum (w_k - u_k) d_k, and g_k = E[(p - onehot) d_k], H_kl = E[Cov_p(d_k, d_l)] of their cross-entropy; float64
    over the counted tokens. The ridge is 1e-3 of H's mean diagonal.
    """
    here = kept.nonzero().flatten()
    count = len(here)
    uniform = kept / count
    gradient, hessian = torch.zeros(count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    tokens = 0
    for at in range(0, len(rows), _BATCH_ROWS):
        batch = rows[at : at + _BATCH_ROWS]
        logits_nv, targets_n = model.counted_logits(uniform, batch)
        without = [torch.where(torch.arange(len(kept)) == k, 0.0, uniform) for k in here]
        moves_knv = count * torch.stack([logits_nv - model.counted_logits(each, batch)[0] for each in without])
        p_nv = logits_nv.softmax(-1)
        means_kn = (p_nv * moves_knv).sum(-1)
        hit_kn = moves_knv.gather(2, targets_n.expand(count, -1)[..., None])[..., 0]
        gradient += (means_kn - hit_kn).sum(1).cpu()
        centred_knv = moves_knv - means_kn[..., None]
        hessian += torch.einsum("nv,knv,lnv->kl", p_nv, centred_knv, centred_knv).cpu()
        tokens += len(targets_n)
    hessian /= tokens
    hessian.diagonal().add_(_RIDGE * hessian.diagonal().mean())
    weights = uniform.double()
    weights[here] -= torch.linalg.solve(hessian, gradient / tokens)
    return weights.clamp(0.0, 1.5).float()


def delta_cosines(adapters: Sequence[AdapterFolder]) -> list[list[float]]:
    """<delta_j, delta_k> / |delta_j| |delta_k| over all modules, module by module; 0 with one that does nothing."""
    count = len(adapters)
    products = torch.zeros(count, count, dtype=torch.float64)
    for module in sorted({module for adapter in adapters for module in adapter.modules}):
        here = {k: adapter.factors(module) for k, adapter in enumerate(adapters) if module in adapter.modules}
        for j in here:
            for k in here:
                products[j, k] += inner(here[j], here[k])
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms[None]
    return torch.where(scale > 0, products / scale.clamp(min=1e-300), 0.0).tolist()


def _read_rows(base: Path, config: LearnConfig, folder: Path, limit: int | None) -> _Rows:
    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    validation, test = (
        encode_documents(tokenizer, read_text(folder / name)) for name in (config.validation, config.test)
    )
    if len(validation) < 6 or len(test) < 2:
        raise DataError(
            f"learning weights needs at least 6 validation and 2 test documents, there are {len(validation)} and "
            f"{len(test)}; separate documents by <|endoftext|>"
        )
    window = checked_window(None, limit)
    fit = [document for place, document in enumerate(validation) if place % 3]
    return _Rows([part for ids in fit for part in split_windows(ids, window)], validation[::3], test)


def _judge(
    model: WeightedModel, ingredients: Sequence[Ingredient], weights: torch.Tensor, test: list[list[int]]
) -> dict[str, Any]:
    count = len(ingredients)
    rivals = {"base": torch.zeros(count)}
    rivals |= {f"only {each.name}": torch.eye(count)[k] for k, each in enumerate(ingredients)}
    rivals |= {"uniform sum": torch.ones(count), "uniform average": torch.full((count,), 1 / count)}
    by_hand = torch.tensor([each.weight for each in ingredients])
    if not torch.equal(by_hand, torch.ones(count)):
        rivals["by hand"] = by_hand
    ours = model.document_losses(weights, test)
    against = {name: _compare(model.document_losses(rival, test), ours) for name, rival in rivals.items()}
    left_out = {}
    for k, each in enumerate(ingredients):
        less = weights.clone()
        less[k] = 0
        left_out[each.name] = _compare(model.document_losses(less, test), ours)
    tokens = sum(row.tokens for row in ours)
    test_report = {"loss": _mean(ours), "documents": len(test), "tokens": tokens, "against": against}
    return {"test": test_report, "leave_one_out": left_out}


def _compare(rival: list[RowLoss], ours: list[RowLoss]) -> dict[str, Any]:
    """`loss` of the rival, and `gain` (rival - ours, nats per token) with its paired interval over documents."""
    found = compare_losses(rival, ours, confidence=_CONFIDENCE, resamples=_RESAMPLES, seed=0)
    return {"loss": found["base_loss"], **{key: found[key] for key in ("gain", "gain_low", "gain_high", "confidence")}}


def _mean(rows: Sequence[RowLoss]) -> float:
    return math.fsum(row.nats for row in rows) / sum(row.tokens for row in rows)
