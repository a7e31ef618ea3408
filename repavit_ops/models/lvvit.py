"""LV-ViT: a plain ViT with a convolutional stem, scaled residuals and a second head over the patch tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import reparam
from ..backends import Backend
from ..nn import ConvReLU2d, PatchProjection
from .classifier import init_linear_
from .patch_embed import check_divisible
from .vit import VisionTransformer

STEM_CHANNELS = 64
AUX_WEIGHT = 0.5  # of the strongest patch token's logits beside the class token's


class ConvStem(nn.Module):
    """7x7 stride 2, 3x3, 3x3, each with BatchNorm and ReLU, then a projection of (patch / 2)² pixels.

    Shapes:
        x        [B, in_chans, H, W]
        returns  [B, dim, H / patch, W / patch]
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"patch_size: got {patch_size}, wanted an even number, since the stem halves the image")
        self.patch_size = patch_size
        self.conv1, self.bn1 = _conv(in_chans, kernel=7, stride=2), nn.BatchNorm2d(STEM_CHANNELS)
        self.conv2, self.bn2 = _conv(STEM_CHANNELS, kernel=3), nn.BatchNorm2d(STEM_CHANNELS)
        self.conv3, self.bn3 = _conv(STEM_CHANNELS, kernel=3), nn.BatchNorm2d(STEM_CHANNELS)
        half = patch_size // 2
        self.proj = nn.Conv2d(STEM_CHANNELS, dim, kernel_size=half, stride=half, bias=bias)

    def as_built(self) -> bool:
        """Whether every part is still of the kind that the constructor made (BatchNorm of any kind)."""
        convs, norms = (self.conv1, self.conv2, self.conv3, self.proj), (self.bn1, self.bn2, self.bn3)
        return all(type(conv) is nn.Conv2d for conv in convs) and all(isinstance(bn, _BatchNorm) for bn in norms)

    def forward(self, x: Tensor) -> Tensor:
        check_divisible(x, self.patch_size)
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        return self.proj(x)


class FusedConvStem(nn.Module):
    """A :class:`ConvStem` for inference: the norms folded into the convolutions, maps channels-last in memory.

    Shapes:
        x        [B, in_chans, H, W]
        returns  [B, dim, H / patch, W / patch]   in memory channels-last, so that flattening to tokens is free
    """

    def __init__(
        self, patch_size: int, in_chans: int, dim: int, *, bias: bool = True, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv1 = ConvReLU2d(in_chans, STEM_CHANNELS, 7, stride=2, padding=3, backend=backend)
        self.conv2 = ConvReLU2d(STEM_CHANNELS, STEM_CHANNELS, 3, padding=1, backend=backend)
        self.conv3 = ConvReLU2d(STEM_CHANNELS, STEM_CHANNELS, 3, padding=1, backend=backend)
        self.proj = PatchProjection(STEM_CHANNELS, dim, patch_size // 2, bias, channels_last=True, backend=backend)

    @classmethod
    @torch.no_grad()
    def folding(cls, stem: Any, backend: Backend = "auto") -> FusedConvStem:
        """The same function as ``stem``, a :class:`ConvStem`, in evaluation mode.

        Raises:
            ValueError: a BatchNorm has no statistics, or ones that are not finite.
        """
        proj, dtype = stem.proj, stem.proj.weight.dtype
        fused: Any = cls(
            stem.patch_size, stem.conv1.in_channels, proj.out_channels, bias=proj.bias is not None, backend=backend
        ).to(device=proj.weight.device, dtype=dtype)
        layers = (
            (stem.conv1, stem.bn1, fused.conv1),
            (stem.conv2, stem.bn2, fused.conv2),
            (stem.conv3, stem.bn3, fused.conv3),
        )
        for conv, bn, to in layers:
            affine = reparam.batchnorm_affine(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
            weight, bias = reparam.fold_affine_into_output(conv.weight.flatten(1), None, affine)
            to.weight.copy_(reparam.cast(weight, dtype, "conv.weight").view_as(to.weight))
            to.bias.copy_(reparam.cast(bias, dtype, "bn.bias"))
        fused.proj.weight.copy_(proj.weight.permute(0, 2, 3, 1).flatten(1))
        if proj.bias is not None:
            fused.proj.bias.copy_(proj.bias)
        return fused.train(stem.training)

    def forward(self, x: Tensor) -> Tensor:
        check_divisible(x, self.patch_size)
        x = self.conv3(self.conv2(self.conv1(x)))
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv(in_chans: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, STEM_CHANNELS, kernel, stride=stride, padding=kernel // 2, bias=False)


class LVViT(VisionTransformer):
    """LV-ViT: logits are those of the class token plus half the maximum over patch tokens of the auxiliary head's.

    Token labelling trains both heads: take their logits from :meth:`forward_dense`.

    Args:
        config: of :class:`VisionTransformer`; here by default ρ = 3, λ = 2, no qkv bias, every LayerNorm eps 1e-5.
    """

    global_pools = ("token",)

    def __init__(self, **config: Any) -> None:
        defaults = {"mlp_ratio": 3.0, "qkv_bias": False, "pre_norm": False, "norm_eps": 1e-5, "skip_lam": 2.0}
        super().__init__(**{**defaults, "embed_layer": ConvStem, **config})
        self.aux_head = self.make_head().apply(init_linear_)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.num_classes == 0:
            return self.pool(x)
        logits, token_logits = self._heads(x)
        return logits + AUX_WEIGHT * token_logits.amax(dim=1)

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images → logits of the class token [B, num_classes] and of the patch tokens [B, h·w, num_classes]."""
        return self._heads(self.forward_features(x))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self.fresh_head()

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.head_drop(x)
        return self.head(x[:, 0]), self.aux_head(x[:, 1:])
