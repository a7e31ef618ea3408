"""Which hidden channels stay active: backward elimination on the Gram matrix, every refit included."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import FitStatistics, cholesky

STEP = 1 / 48  # share of the remaining channels that one step removes


class Elimination(NamedTuple):
    """Order in which channels were removed (the least needed first), and what each step cost.

    Attributes:
        removed: hidden channels, the first removed first.
        kept: hidden channels that are left, ascending.
        curve: (m, loss as a share of ΣY²) behind each step, m falling; the first is the full FFN with w_merged.
    """

    removed: list[int]
    kept: Tensor
    curve: list[tuple[int, float]]


def eliminate(
    statistics: FitStatistics, hidden: int, keep: int, ridge: Tensor, prior: Tensor, step: float = STEP
) -> Elimination:
    """Remove hidden channels until ``keep`` are left, each time those that the refitted rest replaces best.

    Features are [GELU(h) of all hidden channels, n(x), 1]; the last C + 1 always stay. Taking feature j out of a
    least-squares fit W with inverse Gram matrix H raises the loss by ``|W_j|² / H_jj`` once all others are fitted anew
    (the optimal brain surgeon, Hassibi & Stork 1993): what a straight line through n(x) and the other active channels
    can do for j is counted. A step removes the cheapest share of what is left, then updates W and H exactly.

    Args:
        statistics: of features [hidden + C + 1] and targets [C]. hidden: ρC. keep: m.
        ridge, prior: penalty per feature, and the solution that it draws to (:meth:`FitStatistics.solve`).
        step: that share.
    """
    gram = statistics.gram.clone()
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(cholesky(gram))
    right = statistics.cross + ridge[:, None] * prior
    weights = inverse @ right
    constant = statistics.energy + (ridge[:, None] * prior.square()).sum()
    base = (constant - (weights * right).sum()).item()  # penalised loss of the full fit
    scale, removed = max(statistics.energy, 1e-300), list[int]()
    alive = torch.arange(hidden, device=gram.device)  # the channels of the first rows of inverse and weights
    curve = [(hidden, max(base, 0.0) / scale)]
    while len(alive) > keep:
        count = min(max(1, int(len(alive) * step)), len(alive) - keep)
        cost = weights[: len(alive)].square().sum(dim=1) / inverse.diagonal()[: len(alive)].clamp_min(1e-300)
        out = cost.topk(count, largest=False).indices
        stays = torch.ones(len(inverse), dtype=torch.bool, device=gram.device)
        stays[out] = False
        apart = torch.linalg.cholesky(inverse[out][:, out])
        base += (weights[out] * torch.cholesky_solve(weights[out], apart)).sum().item()
        columns = inverse[stays][:, out]
        weights = weights[stays] - columns @ torch.cholesky_solve(weights[out], apart)
        inverse = inverse[stays][:, stays].addmm_(columns, torch.cholesky_solve(columns.T, apart), alpha=-1)
        removed += alive[out].tolist()
        alive = alive[stays[: len(alive)]]
        curve.append((len(alive), max(base, 0.0) / scale))
    return Elimination(removed, alive, curve)
