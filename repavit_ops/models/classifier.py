"""What every image classifier here shares: features, head, and the names timm's tools look for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
        dynamic_img_size: whether images of other sizes than the model was built for are taken.

    Attributes:
        feature_indices, feature_format: what a :class:`FeatureExtractor` takes where it is not told: blocks or stages,
            as timm does, and the layout of the maps.
    """

    global_pools: tuple[str, ...] = ("token", "avg")
    feature_indices: int | None = None
    feature_format = "NCHW"
    formats: tuple[str, ...] = ("NCHW",)  # of forward_intermediates
    dynamic_img_size = True
    forward_intermediates: Callable[..., Any]  # images → features and the maps behind blocks or stages

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        global_pool: str,
        head_bias: bool,
        drop_rate: float,
        dynamic_img_size: bool = True,
    ) -> None:
        super().__init__()
        self.dynamic_img_size = dynamic_img_size
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

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of each block or stage: channels (num_chs), pixels of a cell's side (reduction) and name (module)."""
        raise TypeError(f"{type(self).__name__} must define feature_info")

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off what ``forward_intermediates`` with these ``indices`` does not need.

        Args:
            indices: as ``forward_intermediates`` takes them.
            prune_norm: whether the final norm goes, too. prune_head: whether the head does.

        Returns:
            The same blocks or stages, counted from the first.
        """
        raise TypeError(f"{type(self).__name__} must define prune_intermediate_layers(indices)")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute their activations again in the backward pass instead of keeping them."""
        raise TypeError(f"{type(self).__name__} must define set_grad_checkpointing(enable)")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features → logits [B, num_classes], or with ``pre_logits`` the pooled features [B, num_features]."""
        x = self.pool(x)
        return x if pre_logits else self.head(self.head_drop(x))

    def forward(self, x: Tensor) -> Tensor:
        route = self.route(x)
        return self.forward_head(self.forward_features(x)) if route is None else route.run(x)

    def check_size(self, x: Tensor) -> None:
        """ValueError for images of another size than the model was built for, where that is not to be."""
        if not self._size_is_taken(x):
            (height, width), _ = image_of(self)
            raise ValueError(
                f"x: got images of {x.shape[-2]}x{x.shape[-1]}, wanted {height}x{width}, since dynamic_img_size is "
                "False; resize them or build the model with dynamic_img_size=True"
            )

    def check_format(self, output_fmt: str) -> None:
        """ValueError for a layout of maps that this model does not give."""
        if output_fmt not in self.formats:
            raise ValueError(f"output_fmt: got {output_fmt!r}, wanted one of {', '.join(self.formats)}")

    def _size_is_taken(self, x: Tensor) -> bool:
        return self.dynamic_img_size or x.dim() != 4 or tuple(x.shape[-2:]) == image_of(self)[0]

    def own_image(self) -> Tensor:
        (height, width), channels = image_of(self)
        like = next(self.parameters())
        return torch.empty(1, channels, height, width, dtype=like.dtype, device=like.device)

    def _why_not_now(self, x: Tensor) -> str | None:
        if self.head_drop.training and self.head_drop.p > 0:
            return "the dropout in front of the head is in training mode"
        if not self._size_is_taken(x):
            return "images of this size are refused"
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
        ValueError: an index or a number out of range, or no index at all.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"indices: got the last {indices}, wanted 1 to {count}")
        return list(range(count - indices, count))
    if not indices:
        raise ValueError("indices: got none, wanted at least one, or None for all")
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"indices: got {index}, wanted {-count} <= index < {count}")
    return [index % count for index in indices]


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B, h·w, C] → map [B, C, h, w], contiguous."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid).contiguous()


def trunc_normal_parameter(*shape: int) -> nn.Parameter:
    """A parameter drawn from the normal of standard deviation 0.02."""
    parameter = nn.Parameter(torch.empty(*shape))
    nn.init.trunc_normal_(parameter, std=0.02)
    return parameter
