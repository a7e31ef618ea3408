"""How many channels each block keeps under one FLOP budget, by measured sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Site
from .metric import features
from .selection import Elimination, eliminate
from .solving import DEFAULT_RIDGE, deployed, empty_split, original, penalties
from .streams import Streams

FITTED, PROBED = 96, 32  # images that a block is idled on alone, and those whose final features are compared
COARSE = 1 / 24  # share of the channels that a step of the elimination removes here
GRAIN = 16  # m is a multiple: whole tiles of the kernels


class Sensitivity(NamedTuple):
    """What idling one block alone costs: (m, error of the final features) along its elimination, and MACs of one m."""

    curve: list[tuple[int, float]]
    macs: float


def allocated(sensitivities: list[Sensitivity], keep: list[int]) -> list[int]:
    """m of every block: halfway between ``keep`` and :func:`within_budget`, in whole multiples of 16.

    A sensitivity is of one idled block in an unchanged model. When all are idled and mend what is lost in front, the
    whole way is too far (examples/idle has what was measured).
    """
    best = within_budget(sensitivities, keep)
    return [(m + other) // 2 // GRAIN * GRAIN for m, other in zip(keep, best, strict=True)]


def within_budget(sensitivities: list[Sensitivity], keep: list[int]) -> list[int]:
    """m of every block: the least sum of errors whose MACs do not exceed those of ``keep``.

    Every block takes the m of its curve with the least ``error + λ · MACs``; λ is found by bisection.
    """
    budget = sum(s.macs * m for s, m in zip(sensitivities, keep, strict=True))

    def choice(price: float) -> list[int]:
        return [min(s.curve, key=lambda point: point[1] + price * s.macs * point[0])[0] for s in sensitivities]

    def spent(counts: list[int]) -> float:
        return sum(s.macs * m for s, m in zip(sensitivities, counts, strict=True))

    low, high = 0.0, 1e-12
    while spent(choice(high)) > budget:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(choice(middle)) <= budget else (middle, high)
    return choice(high)


def measure(
    model: nn.Module,
    sites: list[Site],
    streams: Streams,
    keep: list[int],
    roots: Mapping[str, Tensor],
    step: Callable[[], None],
) -> list[Sensitivity]:
    """The sensitivity of every block of the unchanged model.

    One block at a time is idled to ``keep``; the squared error of the final features over their own square is spread
    along the block's elimination curve in proportion to the block's own loss in the metric of ``roots``, which holds
    where errors are small.
    """
    images = streams.first_images(PROBED)
    final = features(model, images)
    found = []
    for index, (site, m) in enumerate(zip(sites, keep, strict=True)):
        split = empty_split(site.ffn, roots[site.name])
        for tokens in islice(streams.at(model, sites, index), streams.batches_of(FITTED)):
            split.update(site.ffn, tokens)
            step()
        statistics, hidden = split.fitted + split.held_out, site.hidden
        ridge, prior = penalties(statistics, hidden, DEFAULT_RIDGE), original(site.ffn) @ split.root
        path = eliminate(statistics, hidden, 0, ridge, prior, COARSE)
        m = min(m, hidden - 1)
        probe = _kept_at(path, hidden, m)
        kept = torch.cat((probe, torch.arange(hidden, len(statistics.gram), device=probe.device)))
        solution = statistics.solve(kept, ridge, prior)
        site.block.mlp = deployed(site.ffn, probe, split.outside(solution))
        error = ((features(model, images) - final).square().sum() / final.square().sum()).item()
        site.block.mlp = site.ffn
        own = max(statistics.loss(solution, kept), 1e-12)
        curve = [(count, error * loss / own) for count, loss in path.curve]
        found.append(Sensitivity([(hidden, 0.0), *curve[1:]], 2.0 * streams.tokens_per_image * site.ffn.dim))
    return found


def _kept_at(path: Elimination, hidden: int, m: int) -> Tensor:
    gone = set(path.removed[: hidden - m])
    return torch.tensor([c for c in range(hidden) if c not in gone], device=path.kept.device, dtype=torch.long)
