"""TIES and DARE on deltas, one module at a time, and the way back to low rank. Not on A and B apart: that is no rule.

Both are lossy by design and end in an SVD, whose own error is measured on the delta itself. Knows matrices, not files.
Shapes, as suffixes of names: o out_features, i in_features.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch

from qlora_core.adapters.low_rank import Compressed, LowRank

EXACT_SVD_FEATURES = 1024
"""Up to this smaller side a delta's SVD is exact; above, randomized (Halko et al. 2011) with measured error."""
_OVERSAMPLING = 16
_POWER_STEPS = 4
_ROWS_AT_ONCE = 1024

Parts = Sequence[tuple[Callable[[], torch.Tensor], float]]
"""For each adapter: what makes its delta [o, i], and its weight. Deltas are made when needed and let go."""


def ties(parts: Parts, density: float) -> torch.Tensor:
    """TIES (Yadav et al. 2023, algorithm 1) of deltas, [o, i].

    Trim each delta to its `density` largest magnitudes, times its weight; elect each entry's sign by the sum; average
    the entries that agree with it. Where two magnitudes tie at the threshold both stay.
    """
    return _elect(parts, lambda make, place: _trim(make(), density))


def dare_ties(parts: Parts, density: float, seeds: Sequence[int]) -> torch.Tensor:
    """As `ties`, with DARE's random dropping in place of trimming."""
    return _elect(parts, lambda make, place: drop_and_rescale(make(), density, seeds[place]))


def dare(parts: Parts, density: float, seeds: Sequence[int]) -> torch.Tensor:
    """sum_k w_k DARE(delta_k), [o, i] (Yu et al. 2023); one seed an adapter, one result for one seed."""
    total = None
    for place, (make, weight) in enumerate(parts):
        dropped = drop_and_rescale(make(), density, seeds[place]).mul_(weight)
        total = dropped if total is None else total.add_(dropped)
    assert total is not None
    return total


def drop_and_rescale(delta_oi: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """Each entry kept with probability `density` and divided by it, so that the expectation stays; a new tensor."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta_oi.shape, generator=generator) < density
    return torch.where(kept, delta_oi / density, 0.0)


def seed_of(seed: int, adapter_digest: str, module: str) -> int:
    """The seed of one adapter's draw on one module: the same whatever else is composed, and in whatever order."""
    return int.from_bytes(hashlib.sha256(f"{seed} {adapter_digest} {module}".encode()).digest()[:7], "big")


def approximate(delta_oi: torch.Tensor, rank: int) -> Compressed:
    """The delta in `rank` columns; `error` is |delta - B A| measured on the float32 factors, sums in float64."""
    rank = min(rank, *delta_oi.shape)
    if min(delta_oi.shape) <= EXACT_SVD_FEATURES:
        u, values, v_t = torch.linalg.svd(delta_oi, full_matrices=False)
        v = v_t.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(delta_oi, min(rank + _OVERSAMPLING, *delta_oi.shape), niter=_POWER_STEPS)
    root = values[:rank].sqrt()
    low = LowRank((v[:, :rank] * root).T.contiguous(), u[:, :rank] * root)
    return Compressed(low, *_error_and_norm(delta_oi, low))


def _elect(parts: Parts, prune: Callable[[Callable[[], torch.Tensor], int], torch.Tensor]) -> torch.Tensor:
    """Two passes over the deltas, so that no more than three matrices are held however many adapters there are."""

    def pruned() -> Iterable[torch.Tensor]:
        for place, (make, weight) in enumerate(parts):
            yield prune(make, place).mul_(weight)

    total = None
    for delta in pruned():
        total = delta if total is None else total.add_(delta)
    assert total is not None
    sign, merged, count = total.sign_(), torch.zeros_like(total), torch.zeros_like(total)
    for delta in pruned():
        agrees = (delta.sign() == sign) & (sign != 0)
        merged += torch.where(agrees, delta, 0.0)
        count += agrees
    return merged / count.clamp_(min=1)


def _trim(delta_oi: torch.Tensor, density: float) -> torch.Tensor:
    kept = max(1, round(density * delta_oi.numel()))
    magnitudes = delta_oi.abs()
    threshold = magnitudes.reshape(-1).kthvalue(delta_oi.numel() - kept + 1).values
    return torch.where(magnitudes >= threshold, delta_oi, 0.0)


def _error_and_norm(delta_oi: torch.Tensor, low: LowRank) -> tuple[float, float]:
    error = norm = 0.0
    for start in range(0, len(delta_oi), _ROWS_AT_ONCE):
        rows = delta_oi[start : start + _ROWS_AT_ONCE]
        left = rows.double() - low.b_or[start : start + _ROWS_AT_ONCE].double() @ low.a_ri.double()
        error += left.square().sum().item()
        norm += rows.double().square().sum().item()
    return math.sqrt(error), math.sqrt(norm)
