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


def eliminate(statistics: FitStatistics, hidden: int, keep: int, ridge: Tensor, prior: Tensor) -> Elimination:
    """Remove hidden channels until ``keep`` are left, each time those that the refitted rest replaces best.

    Features are [GELU(h) of all hidden channels, n(x), 1]; the last C + 1 always stay. Taking feature j out of a
    least-squares fit W with inverse Gram matrix H raises the loss by ``|W_j|² / H_jj`` once all others are fitted anew
    (the optimal brain surgeon, Hassibi & Stork 1993): what a straight line through n(x) and the other active channels
    can do for j is counted. A step removes the cheapest 1/48 of what is left, then updates W and H exactly.

    Args:
        statistics: of features [hidden + C + 1] and targets [C]. hidden: ρC. keep: m.
        ridge, prior: penalty per feature, and the solution that it draws to (:meth:`FitStatistics.solve`).
    """
    gram = statistics.gram.clone()
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(cholesky(gram))
    right = statistics.cross + ridge[:, None] * prior
    weights = inverse @ right
    alive = torch.ones(hidden, dtype=torch.bool, device=gram.device)
    constant = statistics.energy + (ridge[:, None] * prior.square()).sum()
    base = (constant - (weights * right).sum()).item()  # penalised loss of the full fit
    scale, left, removed = max(statistics.energy, 1e-300), hidden, list[int]()
    curve = [(left, max(base, 0.0) / scale)]
    while left > keep:
        count = min(max(1, int(left * STEP)), left - keep)
        cost = weights[:hidden].square().sum(dim=1) / inverse.diagonal()[:hidden].clamp_min(1e-300)
        cost[~alive] = torch.inf
        out = cost.topk(count, largest=False).indices
        columns = inverse[:, out]
        rows = torch.linalg.solve(inverse[out][:, out], torch.cat((weights[out], inverse[out]), dim=1))
        dim = weights.shape[1]
        base += (weights[out] * rows[:, :dim]).sum().item()
        weights -= columns @ rows[:, :dim]
        inverse -= columns @ rows[:, dim:]
        alive[out] = False
        left -= count
        removed += out.tolist()
        curve.append((left, max(base, 0.0) / scale))
    return Elimination(removed, alive.nonzero()[:, 0], curve)
