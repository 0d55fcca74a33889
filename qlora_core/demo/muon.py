"""Muon: momentum whose update for a weight matrix is made nearly orthogonal (Jordan et al. 2024, "Muon").

It pretrains the demo's base in about half the steps AdamW needs. Everything is float32: the usual bfloat16 iteration is
slow on processors without that type. Used for pretraining only; adapters are trained with the optimizers of `train`.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch

ITERATIONS = 4
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic step, from Jordan et al.


class Muon:
    """Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns)). Takes 2-D parameters only."""

    def __init__(self, matrices: Iterable[torch.Tensor], *, momentum: float = 0.95) -> None:
        self._momentum = momentum
        self._averages: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for matrix in matrices:
            self._averages[matrix.shape].append((matrix, torch.zeros_like(matrix)))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every matrix that has a gradient. Equal shapes are orthogonalised in one batch."""
        for (rows, columns), pairs in self._averages.items():
            moved, directions = [], []
            for matrix, average in pairs:
                if matrix.grad is not None:
                    average.lerp_(matrix.grad, 1 - self._momentum)
                    moved.append(matrix)
                    directions.append(matrix.grad.lerp(average, self._momentum))
            if not moved:
                continue
            scale = max(1.0, rows / columns) ** 0.5
            for matrix, update in zip(moved, nearly_orthogonal(torch.stack(directions)), strict=True):
                matrix.add_(update, alpha=-lr * scale)


def nearly_orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Each [rows, columns] matrix of a [count, rows, columns] stack with its singular values moved to roughly 0.7..1.2.

    Newton-Schulz iteration with a quintic polynomial; works on the shorter side's Gram matrix. Zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
