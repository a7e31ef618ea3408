"""One block's FFN in closed form: features, ridge, and the solution as a deployed module."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..nn import PartialGELUFFN
from ..reparam import MergedFFN
from .selection import eliminate
from .statistics import FitStatistics
from .streams import Tokens

# Tried on held-out images, as a share of a feature's mean square
RIDGES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
MEND = 0.5  # how much of what the blocks in front lost a block is asked to mend; all of it learns their noise
DEFAULT_RIDGE = 1e-3  # where there are too few images to hold any out


class Split(NamedTuple):
    """Statistics of the images that are fitted, and of those held out to choose the ridge; targets Y are Y ``root``.

    A least squares fit of Y R is that of Y, times R. What is chosen by its loss, channels and ridge, counts errors by
    the metric R Rᵀ.
    """

    fitted: FitStatistics
    held_out: FitStatistics
    root: Tensor

    def outside(self, solution: Tensor) -> Tensor:
        """A solution for Y, of one for Y ``root``."""
        return torch.linalg.solve(self.root, solution, left=False)

    def update(self, ffn: PartialGELUFFN, tokens: Tokens) -> None:
        """Add a batch: the features of what the FFN is given, and what it must add to reach the original's tokens."""
        root = self.root.to(tokens.inside)
        for statistics, images in ((self.fitted, ~tokens.held_out), (self.held_out, tokens.held_out)):
            inside = tokens.inside[images].flatten(0, -2)
            targets = tokens.after[images].flatten(0, -2) - inside
            statistics.update(features_of(ffn, inside), targets @ root)


class Fit(NamedTuple):
    """A solved block.

    Attributes:
        ffn: the deployed module, shortcut and LayerNorm core kept.
        loss: unexplained share of the target's energy on the calibration images, both in the metric.
        held_out: the same on the images held out to choose the ridge; NaN without any.
        ridge: what was chosen.
    """

    ffn: PartialGELUFFN
    loss: float
    held_out: float
    ridge: float


def goal_of(ffn: PartialGELUFFN, tokens: Tokens) -> Tensor:
    """What a block's FFN is fitted to: between its own output on the changed tokens and the original's, [B, t, C]."""
    return torch.lerp(ffn(tokens.inside), tokens.after, MEND)


def features_of(ffn: PartialGELUFFN, x: Tensor) -> Tensor:
    """``[GELU(h) of every hidden channel, n(x), 1]`` of the FFN's input x: [..., hidden + C + 1]."""
    n = reference.normed(x, ffn.norm_eps or 0.0, ffn.norm)
    h = reference.gelu(F.linear(n, ffn.w_in, ffn.b_in), ffn.approximate)
    return torch.cat((h, n, n.new_ones((*n.shape[:-1], 1))), dim=-1)


def empty_split(ffn: PartialGELUFFN, root: Tensor) -> Split:
    """Of a vanilla FFN, without tokens so far; root: its block's of :func:`repavit_ops.idling.metric.metric_roots`."""
    size, device = ffn.act_channels + ffn.dim + 1, ffn.w_in.device
    return Split(FitStatistics(size, ffn.dim, device), FitStatistics(size, ffn.dim, device), root.double())


def original(ffn: PartialGELUFFN) -> Tensor:
    """The vanilla FFN as a solution on its features, [hidden + C + 1, C]: what the ridge draws to."""
    bias = ffn.w_out.new_zeros(ffn.dim) if ffn.bias is None else ffn.bias
    nothing = ffn.w_out.new_zeros(ffn.dim, ffn.dim)
    return torch.cat((ffn.w_out.detach().T, nothing, bias.detach()[None])).double()


def penalties(statistics: FitStatistics, hidden: int, ridge: float) -> Tensor:
    """The penalty of every feature: ``ridge`` of the mean square of its kind, activations or LayerNorm's output."""
    squares = statistics.gram.diagonal()
    parts = [part.mean().expand(len(part)) for part in (squares[:hidden], squares[hidden:])]
    return ridge * torch.cat(parts).clamp_min(1e-12)


def solve_ffn(ffn: PartialGELUFFN, split: Split, keep: int, ridge: float | None) -> Fit:
    """The deployed FFN of ``keep`` active channels that fits the targets best.

    Channels are chosen by :func:`repavit_ops.idling.selection.eliminate`; then one ridge least squares gives
    [W3, W1, b1] on [GELU(h_active), n(x), 1].

    Args:
        ffn: the vanilla FFN. split: statistics of its features and of the targets, shortcut excluded. keep: m.
        ridge: penalty as a share of a feature's mean square; None chooses it on the held-out images.
    """
    hidden, total, prior = ffn.act_channels, split.fitted + split.held_out, original(ffn) @ split.root
    first = penalties(total, hidden, DEFAULT_RIDGE if ridge is None else ridge)
    chosen = eliminate(total, hidden, keep, first, prior)
    kept = torch.cat((chosen.kept, torch.arange(hidden, len(total.gram), device=chosen.kept.device)))
    held_out = float("nan")
    if split.held_out.count and split.fitted.count:
        trials = {
            r: split.held_out.loss(split.fitted.solve(kept, penalties(split.fitted, hidden, r), prior), kept)
            for r in (RIDGES if ridge is None else (ridge,))
        }
        ridge = min(trials, key=trials.__getitem__)
        held_out = trials[ridge]
    ridge = DEFAULT_RIDGE if ridge is None else ridge
    solution = total.solve(kept, penalties(total, hidden, ridge), prior)
    return Fit(deployed(ffn, chosen.kept, split.outside(solution)), total.loss(solution, kept), held_out, ridge)


def deployed(ffn: PartialGELUFFN, active: Tensor, solution: Tensor) -> PartialGELUFFN:
    """The module of a solution [m + C + 1, C] whose first m rows belong to the hidden channels ``active``."""
    m = len(active)
    merged = MergedFFN(
        ffn.w_in.detach().double()[active],
        (ffn.w_in.new_zeros(ffn.act_channels) if ffn.b_in is None else ffn.b_in.detach()).double()[active],
        solution[:m].T,
        solution[m:-1].T,
        solution[-1],
        residual=True,
    )
    return PartialGELUFFN.from_merged(
        merged,
        dtype=ffn.w_in.dtype,
        norm_eps=ffn.norm_eps,
        norm=ffn.norm,
        approximate=ffn.approximate,
        hidden=ffn.hidden or ffn.act_channels,
    )
