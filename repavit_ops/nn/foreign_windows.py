"""Fused Swin blocks and patch mergings under the signatures of transformers: tokens in a row, with the map's size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .foreign_signatures import SignatureBlock
from .patch_projection import PatchProjection


class TransformersSwinLayer(SignatureBlock):
    """``forward(hidden_states, input_dimensions, always_partition=False, **kwargs)``, as transformers' SwinLayer.

    Unlike that one it keeps no state: each call is answered as the first one of a model just built.

    Shapes:
        hidden_states  [B, H·W, C], with input_dimensions (H, W)
        returns        ([B, H·W, C], None)
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **_: Any
    ) -> tuple[Tensor, None]:
        x = self._map(hidden_states, input_dimensions, always_partition)
        return self.mlp(self.attn(x, static_shift=always_partition).flatten(1, 2)), None

    def enter(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        size, *flags = args if args else (kwargs.get("input_dimensions"),)
        if any(flags) or kwargs.get("always_partition") or kwargs.get("output_attentions") or size is None:
            return None
        return self._map(x, size, False)

    def leave(self, y: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return y.flatten(1, 2), None

    def _map(self, tokens: Tensor, size: tuple[int, int], always_partition: bool) -> Tensor:
        window = vars(self)["window"]
        if not always_partition and min(size) < window:
            raise ValueError(
                f"input_dimensions: got maps of {size[0]}x{size[1]}, wanted no side below the window of {window}; "
                "resize the images"
            )
        return tokens.unflatten(1, tuple(size))


class TransformersSwinTuple(TransformersSwinLayer):
    """``forward(hidden_states, input_dimensions, output_attentions=False, always_partition=False)`` → a tuple of one,
    as DonutSwin's layer. Shapes as :class:`TransformersSwinLayer`."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> tuple[Tensor]:
        if output_attentions:
            raise RuntimeError("output_attentions: this layer is fused, without attention maps; ask the unfused model")
        return super().forward(hidden_states, input_dimensions, always_partition)[:1]

    def enter(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return None if any(args[1:]) else super().enter(x, *args[:1], **kwargs)

    def leave(self, y: Tensor, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (y.flatten(1, 2),)


class MaskFormerSwinLayer(TransformersSwinTuple):
    """``forward(hidden_states, input_dimensions, output_attentions=False)``: shifts and pads maps of every size."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool = False
    ) -> tuple[Tensor]:
        return super().forward(hidden_states, input_dimensions, output_attentions, always_partition=True)

    def enter(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return None  # it shifts where the one call of Swin would not


class TokensMerging(nn.Module):
    """``forward(input_feature, input_dimensions)``, as the patch mergings of transformers' Swins.

    Shapes:
        input_feature  [B, H·W, C], with input_dimensions (H, W)
        returns        [B, ⌈H/2⌉·⌈W/2⌉, 2C]
    """

    def __init__(self, projection: PatchProjection) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        return self.projection(input_feature.unflatten(1, tuple(input_dimensions))).flatten(1, 2)
