"""Deployed form of what projects patches: the convolution of a patch embedding, Swin's patch merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backends import Backend
from ..stack_plan import Step
from .init import linear_init_
from .packed_weights import PackedWeights
from .symbolic import call_of, is_proxy


class PatchProjection(PackedWeights):
    """Patches of an image or map, projected in one call: ``z Wᵀ + bias`` per patch.

    z is a patch's elements, or their LayerNorm core when ``norm_eps`` is given. Takes the place of a convolution whose
    stride is its kernel, or with ``channels_last`` of Swin's patch merging.

    Shapes:
        x        [B, in_chans, H, W]             or [B, H, W, in_chans] with channels_last
        weight   [dim_out, K]                    K = in_chans·ph·pw in the order c, y, x; or y, x, c; bias [dim_out]
        returns  [B, dim_out, H // ph, W // pw]  in x's layout; in memory channels-last either way

    Args:
        in_chans: channels of x. dim_out: channels of the result.
        patch: pixels, one number or (height, width).
        bias: whether the bias exists.
        channels_last: layout of x, of a patch and of the result.
        norm_eps: variance offset of the LayerNorm core over a patch; None for no norm.
        pad: pad x with zeros to whole patches at the right and the bottom; False leaves the rest out.
        backend: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError: at a call, as the operator does.
    """

    operator = "patch_projection"
    packed_names = ("weight",)

    def __init__(
        self,
        in_chans: int,
        dim_out: int,
        patch: int | tuple[int, int],
        bias: bool = True,
        *,
        channels_last: bool = False,
        norm_eps: float | None = None,
        pad: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch: tuple[int, int] = (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])
        self.in_chans, self.dim_out = in_chans, dim_out
        self.channels_last, self.norm_eps, self.pad = channels_last, norm_eps, pad
        self.backend = backend
        depth = in_chans * self.patch[0] * self.patch[1]
        self.weight = nn.Parameter(torch.empty(dim_out, depth, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim_out, device=device, dtype=dtype)) if bias else None
        linear_init_(self.weight, self.bias)

    def pack(self, *weights: Tensor | None) -> Tensor:
        return torch.ops.repavit_ops.patch_projection_pack(*weights)

    def no_rows(self) -> tuple[int, ...]:
        return (0, *self.patch, self.in_chans) if self.channels_last else (0, self.in_chans, *self.patch)

    def forward(self, x: Tensor) -> Tensor:
        if is_proxy(x):
            return call_of(self, x)
        if self.pad:
            down, across = (1, 2) if self.channels_last else (2, 3)
            bottom, right = -x.shape[down] % self.patch[0], -x.shape[across] % self.patch[1]
            if bottom or right:
                x = F.pad(x, (0, 0, 0, right, 0, bottom) if self.channels_last else (0, right, 0, bottom))
        packed, (weight,) = self.current()
        self.check_trainable(x)
        y = ops.patch_projection(
            x,
            weight,
            self.bias,
            **self._static(),
            packed=packed,
            backend=self.backend_for(x),
        )
        return y if self.channels_last else y.permute(0, 3, 1, 2)

    def step(self, size: Sequence[int]) -> Step:
        """This module's call on whole patches of maps of ``size`` (H, W) as a step of one operator call."""
        packed, (weight,) = self.current()
        shape = (*size, self.in_chans) if self.channels_last else (self.in_chans, *size)
        return Step(self.operator, (weight, self.bias), self._static(), packed, self._pytorch_at(*shape))

    def _static(self) -> dict[str, Any]:
        return {"patch": self.patch, "channels_last": self.channels_last, "norm_eps": self.norm_eps}

    def extra_repr(self) -> str:
        return (
            f"in_chans={self.in_chans}, dim_out={self.dim_out}, patch={self.patch}, bias={self.bias is not None}, "
            f"channels_last={self.channels_last}, norm_eps={self.norm_eps}, pad={self.pad}, backend={self.backend!r}"
        )
