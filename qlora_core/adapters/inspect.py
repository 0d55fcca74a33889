"""Looks into adapters: how large, how wide in truth, where they act, and how two differ. Knows factors, no base."""

import math
from pathlib import Path
from typing import Any

import torch

from qlora_core.adapters.adapter_folder import AdapterFolder, open_adapter
from qlora_core.adapters.low_rank import LowRank, concatenate, inner, singular_values

ENERGY = 0.99
"""Share of |delta|^2 that `rank_99` columns hold."""


def inspect_adapter(folder: Path) -> dict[str, Any]:
    """Norms and ranks of an adapter, module by module, the largest share of the whole first.

    {"digest", "rank" (largest stored), "modules", "norm", "layers": [{"module", "rank", "norm", "share" (of |delta|^2),
    "effective_rank" (exponential of the singular values' entropy, Roy & Vetterli 2007), "rank_99" (columns that hold
    99 % of |delta|^2), "largest_singular_value"}]}. A module that does nothing has ranks of 0.

    Raises:
        ModelError: see `open_adapter`.
    """
    adapter = open_adapter(folder)
    layers = [_layer(module, adapter.rank(module), adapter.factors(module)) for module in adapter.modules]
    whole = math.fsum(layer["norm"] ** 2 for layer in layers)
    for layer in layers:
        layer["share"] = layer["norm"] ** 2 / whole if whole else 0.0
    return {
        "digest": adapter.digest,
        "rank": max(adapter.rank(module) for module in adapter.modules),
        "modules": len(layers),
        "norm": math.sqrt(whole),
        "provenance": dict(adapter.provenance),
        "layers": sorted(layers, key=lambda layer: -layer["share"]),
    }


def diff_adapters(first: Path, second: Path) -> dict[str, Any]:
    """How two adapters differ as what they do, whatever their ranks and scales.

    {"cosine", "relative_difference" (|d1 - d2| / |d1|, None where the first does nothing), "only_first", "only_second"
    (modules), "layers": [{"module", "norms", "cosine", "difference"}] with the largest difference first, "equal":
    whether the difference is 0}.

    Raises:
        ModelError: see `open_adapter`, or a module whose shapes differ.
    """
    one, two = open_adapter(first), open_adapter(second)
    layers = [_difference(one, two, module) for module in sorted({*one.modules, *two.modules})]
    norms = [math.sqrt(math.fsum(layer["norms"][side] ** 2 for layer in layers)) for side in (0, 1)]
    product = math.fsum(layer.pop("product") for layer in layers)
    difference = math.sqrt(math.fsum(layer["difference"] ** 2 for layer in layers))
    return {
        "cosine": product / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0,
        "relative_difference": difference / norms[0] if norms[0] else None,
        "equal": difference == 0,
        "norms": norms,
        "only_first": sorted({*one.modules} - {*two.modules}),
        "only_second": sorted({*two.modules} - {*one.modules}),
        "layers": sorted(layers, key=lambda layer: -layer["difference"]),
    }


def _layer(module: str, rank: int, update: LowRank) -> dict[str, Any]:
    values = singular_values(update)
    squares = values.square()
    whole = squares.sum().item()
    effective, needed = 0.0, 0
    if whole:
        shares = values / values.sum()
        shares = shares[shares > 0]
        effective = math.exp(-(shares * shares.log()).sum().item())
        needed = int((squares.cumsum(0) < ENERGY * whole).sum().item()) + 1
    return {
        "module": module,
        "rank": rank,
        "norm": math.sqrt(whole),
        "effective_rank": effective,
        "rank_99": needed,
        "largest_singular_value": values.max().item() if len(values) else 0.0,
    }


def _difference(one: AdapterFolder, two: AdapterFolder, module: str) -> dict[str, Any]:
    updates = [adapter.factors(module) if module in adapter.modules else None for adapter in (one, two)]
    shape = next(update.shape for update in updates if update is not None)
    first, second = (update or LowRank(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0)) for update in updates)
    product, norms = inner(first, second), [first.norm(), second.norm()]
    left = concatenate([(first, 1.0), (second, -1.0)])
    # By singular values: the difference of nearly equal deltas would drown in the rounding of their inner products
    values = singular_values(left)
    difference = values.square().sum().sqrt().item()
    floor = 1e-7 * max(norms)
    return {
        "module": module,
        "norms": norms,
        "cosine": product / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0,
        "difference": 0.0 if difference <= floor else difference,
        "product": product,
    }
