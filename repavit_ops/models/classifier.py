"""What every image classifier here shares: features, head, and the names timm's tools look for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..stack import OneCall
from .patch_embed import image_of


class ImageClassifier(OneCall):
    """Base of the models: ``forward = forward_head(forward_features(x))``, fused in one operator call where it can be.

    A subclass defines ``forward_features`` and ``pool`` and, at the end of its constructor, calls :meth:`init_weights`.
    One that also defines ``steps`` can run in one call.

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
        route = self.route(x)
        return self.forward_head(self.forward_features(x)) if route is None else route.run(x)

    def own_image(self) -> Tensor:
        (height, width), channels = image_of(self)
        like = next(self.parameters())
        return torch.empty(1, channels, height, width, dtype=like.dtype, device=like.device)

    def _why_not_now(self, x: Tensor) -> str | None:
        if self.head_drop.training and self.head_drop.p > 0:
            return "the dropout in front of the head is in training mode"
        return super()._why_not_now(x)

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
