"""What every image classifier here shares: features, head, and the names timm's tools look for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import stack_plan
from ..nn.packed_weights import PackedWeights
from ..nn.route import Route, Segment, hooks_below, why_not_here, why_not_now
from ..stack_plan import Step
from .one_call import Apart
from .patch_embed import image_of

SPOKEN_FOR = ("embed", "forward_features", "pool", "forward_head")  # what steps() does in a forward's place


class ImageClassifier(nn.Module):
    """Base of the models: ``forward = forward_head(forward_features(x))``, fused in one operator call where it can be.

    A subclass defines ``forward_features`` and ``pool`` and, at the end of its constructor, calls :meth:`init_weights`.
    One that also defines :meth:`steps` can run in one call.

    Args:
        global_pool: how features become one vector, one of ``global_pools``.
        num_features: channels of the pooled feature.
        num_classes: outputs of the head; 0 for no head.
        head_bias: whether the head has a bias.
        drop_rate: dropout probability in front of the head.
    """

    global_pools: tuple[str, ...] = ("token", "avg")

    def __init__(
        self, num_features: int, num_classes: int, *, global_pool: str, head_bias: bool, drop_rate: float
    ) -> None:
        super().__init__()
        self.set_global_pool(global_pool)
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.head_bias = head_bias
        self.head_drop = nn.Dropout(drop_rate)
        self.in_one_call = False  # repavit_ops.fuse says when to try
        self._routes: dict[tuple[Any, ...], Route] = {}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] → features after the final norm."""
        raise TypeError(f"{type(self).__name__} must define forward_features(x)")

    def pool(self, x: Tensor) -> Tensor:
        """Features → one vector per image [B, num_features]."""
        raise TypeError(f"{type(self).__name__} must define pool(x)")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features → logits [B, num_classes], or with ``pre_logits`` the pooled features [B, num_features]."""
        x = self.pool(x)
        return x if pre_logits else self.head(self.head_drop(x))

    def forward(self, x: Tensor) -> Tensor:
        route = self._route(x)
        return self.forward_head(self.forward_features(x)) if route is None else route.run(x)

    def steps(self, x: Tensor) -> list[Step]:
        """The model on images like ``x`` as steps of one call.

        Raises:
            Apart: some part cannot be one; says which.
        """
        raise Apart(f"{type(self).__name__} knows no steps")

    def why_apart(self, x: Tensor | None = None) -> str | None:
        """Why a fused model takes more than one call (for images like ``x``, where given), in one line; None if one."""
        try:
            self._segments(self._own_image() if x is None else x)
        except Apart as apart:
            return str(apart)
        return None if x is None else self._why_not_now(x)

    def _route(self, x: Tensor) -> Route | None:
        if not self.in_one_call or torch.compiler.is_compiling() or self._why_not_now(x) is not None:
            return None
        key = (x.device, x.dtype, *x.shape[1:], self.global_pool)
        route = self._routes.get(key)
        if route is None or not route.holds():
            try:
                self._routes[key] = route = Route.of(self, self._segments(x))
            except Apart:
                return None
        return route

    def _segments(self, x: Tensor) -> list[Segment]:
        fused = [module for module in self.modules() if isinstance(module, PackedWeights)]
        if not fused:
            raise Apart("no block is fused")
        if any(hooks_below(self)):
            raise Apart("a part has forward hooks")
        if (reason := self._overridden() or why_not_here(fused, x)) is not None:
            raise Apart(reason)
        if x.dim() != 4 or x.dtype != next(self.parameters()).dtype:
            raise Apart(f"x is {x.dtype} {list(x.shape)}, wanted images in the weights' dtype")
        with torch.no_grad():
            return [stack_plan.encode(self.steps(x))]

    def _overridden(self) -> str | None:
        owner = next(c for c in type(self).__mro__ if "steps" in c.__dict__)
        for name in SPOKEN_FOR:
            if getattr(type(self), name, None) is not getattr(owner, name, None):
                return f"{type(self).__name__} has a {name} of its own"
        return None

    def _why_not_now(self, x: Tensor) -> str | None:
        if self.head_drop.training and self.head_drop.p > 0:
            return "the dropout in front of the head is in training mode"
        for name in SPOKEN_FOR:
            if name in self.__dict__:
                return f"it has a {name} of its own"
        return why_not_now(self, x)

    def _own_image(self) -> Tensor:
        (height, width), channels = image_of(self)
        like = next(self.parameters())
        return torch.empty(1, channels, height, width, dtype=like.dtype, device=like.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_routes": {}}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one of ``num_classes`` outputs (0: none); device and dtype stay."""
        if global_pool is not None:
            self.set_global_pool(global_pool)
        self.num_classes = num_classes
        self.head = self.fresh_head()

    def set_global_pool(self, global_pool: str) -> None:
        if global_pool not in self.global_pools:
            raise ValueError(f"global_pool: got {global_pool!r}, wanted one of {', '.join(self.global_pools)}")
        self.global_pool = global_pool

    def make_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes, bias=self.head_bias)

    def fresh_head(self) -> nn.Module:
        """An initialised head where the model's parameters are, in their dtype."""
        like = next(self.parameters())
        return self.make_head().to(device=like.device, dtype=like.dtype).apply(init_linear_)

    def init_weights(self) -> None:
        """Normal of standard deviation 0.02 for every Linear weight, zero for its bias; norms stay one and zero."""
        self.apply(init_linear_)


def init_linear_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which of ``count`` stages or blocks are asked for: None all, a number the last n, a sequence those (may be < 0).

    Raises:
        ValueError: an index or a number out of range.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"indices: got the last {indices}, wanted 1 to {count}")
        return list(range(count - indices, count))
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"indices: got {index}, wanted {-count} <= index < {count}")
    return [index % count for index in indices]


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B, h·w, C] → map [B, C, h, w]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def trunc_normal_parameter(*shape: int) -> nn.Parameter:
    """A parameter drawn from the normal of standard deviation 0.02."""
    parameter = nn.Parameter(torch.empty(*shape))
    nn.init.trunc_normal_(parameter, std=0.02)
    return parameter
