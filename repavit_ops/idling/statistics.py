"""Sufficient statistics of a linear fit, streamed: Gram matrices in float64."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096  # tokens per product: one product is in the features' dtype, the sum over products in float64


class FitStatistics:
    """``FᵀF``, ``FᵀY`` and ``ΣY²`` over all tokens, for features F [n, p] and targets Y [n, c].

    Memory is p² + p·c numbers whatever n is.

    Attributes:
        gram [p, p], cross [p, c] in float64; energy: ΣY²; count: n.
    """

    def __init__(self, features: int, targets: int, device: torch.device | None = None) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features, targets, dtype=torch.float64, device=device)
        self.energy, self.count = 0.0, 0

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add tokens: features [n, p], targets [n, c]."""
        for f, y in zip(features.split(ROWS), targets.split(ROWS), strict=True):
            self.gram += (f.T @ f).double()
            self.cross += (f.T @ y).double()
            self.energy += y.double().square().sum().item()
            self.count += len(f)

    def __add__(self, other: FitStatistics) -> FitStatistics:
        total = FitStatistics(self.cross.shape[0], self.cross.shape[1], self.gram.device)
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        total.energy, total.count = self.energy + other.energy, self.count + other.count
        return total

    def loss(self, solution: Tensor, kept: Tensor) -> float:
        """``Σ(Y - F[:, kept] W)² / ΣY²`` of a solution W [len(kept), c], without the tokens."""
        gram, cross = self.gram[kept][:, kept], self.cross[kept]
        error = self.energy - 2 * (solution * cross).sum() + (solution * (gram @ solution)).sum()
        return float(error) / max(self.energy, 1e-300)

    def solve(self, kept: Tensor, ridge: Tensor, prior: Tensor) -> Tensor:
        """W [len(kept), c] that minimises ``Σ(Y - F[:, kept] W)² + Σ ridge (W - prior)²``.

        Shapes:
            ridge [p], one number per feature; prior [p, c]
        """
        gram = self.gram[kept][:, kept]
        gram.diagonal().add_(ridge[kept])
        right = self.cross[kept] + ridge[kept, None] * prior[kept]
        return torch.cholesky_solve(right, cholesky(gram))


def cholesky(gram: Tensor) -> Tensor:
    """Cholesky factor of a penalised Gram matrix.

    Raises:
        ValueError: the penalty is too weak for features that depend on each other.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ValueError("ridge: too weak for these features, whose products are rounded; wanted at least 1e-5")
    return factor
