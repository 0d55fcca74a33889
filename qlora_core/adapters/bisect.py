"""Finds what in an adapter, or which adapter of several, makes a text worse. Knows losses and switches, not training.

Adapters are on the base at weight 1. First each is taken off in turn: the one whose absence helps most is the culprit.
Then its layers are halved: of the blocks of the model, the half whose removal helps more is looked into, down to one
block, and at last to one module. Passes: one for each adapter, two for each halving, one for each module of the block.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qlora_core.adapters.adapter_folder import open_adapter
from qlora_core.adapters.lineage import check_parents_present
from qlora_core.adapters.on_base import check_on_base
from qlora_core.adapters.weighted_model import WeightedModel
from qlora_core.errors import DataError
from qlora_core.evaluation.heldout import RowLoss, compare_losses
from qlora_core.model.base import load_any
from qlora_core.model.perplexity import encode_documents, read_text

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_CONFIDENCE = 0.95
_RESAMPLES = 1000


def bisect_regression(base: Path, folders: Sequence[Path], text: Path) -> dict[str, Any]:
    """Which adapter, block and module cost the most on a text, by what taking them off gives back.

    {"loss": {"base", "adapters"}, "regression" (adapters - base, nats per token, with interval; under 0: there is
    none), "by_adapter": [{"adapter", "given_back", "low", "high"}], "culprit": {"adapter", "block", "module"},
    "steps": [...]}.
    `given_back` is the loss with all less the loss without that part: above 0 it did harm. Where there is no regression
    beyond chance, `culprit` is None.

    Raises:
        DataError: a text of fewer than two documents. ModelError: an adapter that does not fit.
    """
    adapters = [open_adapter(folder) for folder in folders]
    check_parents_present(adapters)
    check_on_base(base, adapters)
    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    documents = encode_documents(tokenizer, read_text(text))
    if len(documents) < 2:
        raise DataError(f"{text} holds {len(documents)} documents; an interval needs at least 2")
    model = WeightedModel(load_any(base), adapters)
    try:
        return _Search(model, [str(folder) for folder in folders], documents).report()
    finally:
        model.remove()


class _Search:
    def __init__(self, model: WeightedModel, names: Sequence[str], documents: Sequence[Sequence[int]]) -> None:
        self._model, self._names, self._documents = model, names, documents
        self._ones = torch.ones(len(names), len(model.modules))
        self._whole = self._losses(self._ones)
        self._steps: list[dict[str, Any]] = []

    def report(self) -> dict[str, Any]:
        plain = self._losses(torch.zeros_like(self._ones))
        found = self._compare(plain, self._whole)
        regression = {"value": -found["gain"], "low": -found["gain_high"], "high": -found["gain_low"]}
        by_adapter = []
        for k, name in enumerate(self._names):
            by_adapter.append({"adapter": name, **self._given_back(k, range(len(self._model.modules)))})
        culprit = None
        if regression["low"] > 0:
            k = max(range(len(by_adapter)), key=lambda k: by_adapter[k]["given_back"])
            culprit = {"adapter": self._names[k], **self._narrow(k)}
        return {
            "loss": {"base": found["base_loss"], "adapters": found["adapter_loss"]},
            "regression": regression,
            "documents": found["rows"],
            "by_adapter": by_adapter,
            "culprit": culprit,
            "steps": self._steps,
        }

    def _narrow(self, k: int) -> dict[str, str]:
        blocks: dict[str, list[int]] = {}
        for place, module in enumerate(self._model.modules):
            match = _BLOCK.match(module)
            blocks.setdefault(match.group(1) if match else module, []).append(place)
        names = sorted(blocks, key=_natural)
        while len(names) > 1:
            halves = [names[: len(names) // 2], names[len(names) // 2 :]]
            gains = [self._step(k, half, [place for name in half for place in blocks[name]]) for half in halves]
            names = halves[0] if gains[0] >= gains[1] else halves[1]
        modules = blocks[names[0]]
        gains = {place: self._step(k, [self._model.modules[place]], [place]) for place in modules}
        return {"block": names[0], "module": self._model.modules[max(gains, key=lambda place: gains[place])]}

    def _step(self, k: int, without: Sequence[str], places: Sequence[int]) -> float:
        found = self._given_back(k, places)
        self._steps.append({"without": list(without), **found})
        return found["given_back"]

    def _given_back(self, k: int, places: Sequence[int] | range) -> dict[str, float]:
        weights = self._ones.clone()
        weights[k, list(places)] = 0
        found = self._compare(self._whole, self._losses(weights))
        return {"given_back": found["gain"], "low": found["gain_low"], "high": found["gain_high"]}

    def _losses(self, weights: torch.Tensor) -> list[RowLoss]:
        return self._model.document_losses(weights, self._documents)

    def _compare(self, first: list[RowLoss], second: list[RowLoss]) -> dict[str, Any]:
        return compare_losses(first, second, confidence=_CONFIDENCE, resamples=_RESAMPLES, seed=0)


def _natural(name: str) -> list[Any]:
    """Block 10 after block 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
