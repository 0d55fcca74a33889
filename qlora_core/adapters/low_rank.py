"""Exact arithmetic of low-rank updates: a delta is B A, its scale in B. Only `compress` loses, and says how much.

Knows matrices: no file, module or setting. Shapes, as suffixes of names: r rank, i in_features, o out_features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_core.errors import ModelError


@dataclass(frozen=True)
class LowRank:
    """delta_oi = b_or a_ri, float32 on the CPU; rank 0 is the zero update."""

    a_ri: torch.Tensor
    b_or: torch.Tensor

    @property
    def rank(self) -> int:
        """Columns of B, whether or not they are independent."""
        return self.a_ri.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The delta's [out_features, in_features]."""
        return self.b_or.shape[0], self.a_ri.shape[1]

    def dense(self) -> torch.Tensor:
        """The delta [o, i] in float32."""
        return self.b_or @ self.a_ri

    def norm(self) -> float:
        """Frobenius norm of the delta, from the factors: |BA|^2 = sum((B^T B) * (A A^T)), in float64."""
        a, b = self.a_ri.double(), self.b_or.double()
        return math.sqrt(max(0.0, ((b.T @ b) * (a @ a.T)).sum().item()))


@dataclass(frozen=True)
class Compressed:
    """A delta of lower rank. `error` is |delta - kept| and `norm` is |delta|, Frobenius."""

    kept: LowRank
    error: float
    norm: float


def concatenate(parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    """sum_k w_k B_k A_k as [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...], of summed rank: exact up to rounding w_k B_k once.

    Raises:
        ModelError: no part, parts of other shapes, or a product beyond float32.
    """
    if not parts or len({part.shape for part, _ in parts}) != 1:
        raise ModelError(f"updates of shapes {sorted({part.shape for part, _ in parts})} have no sum; one is needed")
    b_or = torch.cat([part.b_or if weight == 1 else part.b_or * weight for part, weight in parts], dim=1)
    if not torch.isfinite(b_or).all():
        raise ModelError(f"weights {[weight for _, weight in parts]} times B are beyond float32; give smaller weights")
    return LowRank(torch.cat([part.a_ri for part, _ in parts]), b_or)


def compress(delta: LowRank, rank: int) -> Compressed:
    """The best approximation of at most `rank` (Eckart-Young 1936), balanced: B = U sqrt(S), A = sqrt(S) V^T.

    Through QR of both factors, so that nothing larger than they are is made; float64 within. The result has fewer than
    `rank` columns where the factors have. The error is the discarded singular values'.
    """
    q_b, r_b = torch.linalg.qr(delta.b_or.double())
    q_a, r_a = torch.linalg.qr(delta.a_ri.double().T)
    u, values, v_t = torch.linalg.svd(r_b @ r_a.T)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    low = LowRank((root[:, None] * (v_t[:kept] @ q_a.T)).float(), ((q_b @ u[:, :kept]) * root).float())
    return Compressed(low, values[kept:].square().sum().sqrt().item(), values.square().sum().sqrt().item())


def pad(delta: LowRank, rank: int) -> LowRank:
    """The same delta with zero rows in A and columns in B up to `rank`.

    Raises:
        ModelError: its rank is above that.
    """
    missing = rank - delta.rank
    if missing < 0:
        raise ModelError(f"an update of rank {delta.rank} does not fit rank {rank}; compress it, or ask for more")
    if not missing:
        return delta
    a_pad, b_pad = torch.zeros(missing, delta.shape[1]), torch.zeros(delta.shape[0], missing)
    return LowRank(torch.cat([delta.a_ri, a_pad]), torch.cat([delta.b_or, b_pad], dim=1))


def singular_values(delta: LowRank) -> torch.Tensor:
    """The delta's singular values in float64, falling, [min(r, o, i)]."""
    r_b = torch.linalg.qr(delta.b_or.double())[1]
    r_a = torch.linalg.qr(delta.a_ri.double().T)[1]
    return torch.linalg.svdvals(r_b @ r_a.T)


def inner(first: LowRank, second: LowRank) -> float:
    """<delta_1, delta_2> = sum((B_1^T B_2) * (A_1 A_2^T)), in float64; no delta is made."""
    between_b = first.b_or.double().T @ second.b_or.double()
    between_a = first.a_ri.double() @ second.a_ri.double().T
    return (between_b * between_a).sum().item()
