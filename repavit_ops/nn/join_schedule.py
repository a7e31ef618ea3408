"""How the join coefficient α rises over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from .join import set_join

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class JoinCurve:
    """α as a function of the training step s of S: 0 through a warm-up, a rise, then exactly 1 to the end::

        α(s) = 0 for s ≤ warmup · S          r = (s / S - warmup) / (1 - warmup - hold)
             = r, or (1 - cos πr) / 2        "linear", or "cosine"
             = 1 for s ≥ (1 - hold) · S

    Args:
        steps: S, of the whole training.
        shape: "linear" or "cosine".
        warmup: share of the steps, from the first, during which the branches learn apart.
        hold: share of the steps, up to the last, during which they train as the one branch that merging leaves.

    Raises:
        ValueError: steps < 1, an unknown shape, or a warmup and hold that leave no step to rise in.
    """

    steps: int
    shape: Shape = "linear"
    warmup: float = 0.1
    hold: float = 0.4

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, wanted the steps of the whole training, at least 1")
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape: got {self.shape!r}, wanted one of {', '.join(get_args(Shape))}")
        if min(self.warmup, self.hold) < 0 or not self.warmup + self.hold < 1:
            raise ValueError(
                f"warmup, hold: got {self.warmup} and {self.hold}, wanted shares of the training, each at least 0 and "
                "together below 1, so that steps remain for α to rise in"
            )

    def __call__(self, step: int) -> float:
        """α during step s, counted from 0."""
        progress = step / self.steps
        if progress >= 1 - self.hold:
            return 1.0
        rise = max(0.0, progress - self.warmup) / (1 - self.warmup - self.hold)
        # rounding may carry the last step of the rise a hair past 1
        return min(1.0, rise if self.shape == "linear" else (1 - math.cos(math.pi * rise)) / 2)


class JoinSchedule:
    """Moves α of a model along a :class:`JoinCurve`, stepped beside the optimizer as learning rates are::

        schedule = JoinSchedule(model, epochs * len(loader))
        for images, labels in batches:
            ...
            optimizer.step()
            schedule.step()

    It sets α(0) when it is made. α itself lives in the model's buffers and travels in its checkpoints; to resume the
    schedule, restore its own state dict, or name the step: ``schedule.step(updates)``.

    Args:
        model: has joined branches (:class:`JoinedBranchFFN`, :class:`JoinedBranchAttention`).
        steps, shape, warmup, hold: of the curve.

    Raises:
        ValueError: as :class:`JoinCurve`, or the model has no joined branches.
    """

    def __init__(
        self, model: nn.Module, steps: int, *, shape: Shape = "linear", warmup: float = 0.1, hold: float = 0.4
    ) -> None:
        self.model, self.curve = model, JoinCurve(steps, shape, warmup, hold)
        self.count = 0
        self.step(0)

    @property
    def alpha(self) -> float:
        """α now."""
        return self.curve(self.count)

    def step(self, at: int | None = None) -> float:
        """Go on to the next step, or to step ``at``; sets α in the model and returns it.

        Raises:
            ValueError: ``at`` is negative.
        """
        if at is not None and at < 0:
            raise ValueError(f"at: got {at}, wanted the number of optimizer steps made so far")
        self.count = self.count + 1 if at is None else at
        set_join(self.model, self.alpha)
        return self.alpha

    def state_dict(self) -> dict[str, int]:
        """What resuming needs: the number of steps made."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the step of a saved schedule and set its α."""
        self.step(state["count"])
