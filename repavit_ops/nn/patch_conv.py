"""Deployed form of the convolution that embeds patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import Backend
from .packed_weights import Copy, PackedWeights
from .symbolic import call_of, is_proxy


class PatchConv2d(PackedWeights, nn.Conv2d):
    """An ``nn.Conv2d`` whose stride is its kernel, as one projection of patches; parameters and keys are the same.

    Shapes:
        x        [B, in_channels, H, W]
        returns  [B, out_channels, H // kh, W // kw]   in memory channels-last, so that flattening to tokens is free

    Raises:
        ValueError: at a call, as :func:`repavit_ops.ops.patch_projection` does.
    """

    operator = "patch_projection"
    packed_names = ("weight",)

    @classmethod
    def replacing(cls, conv: nn.Conv2d, backend: Backend = "auto") -> PatchConv2d:
        """The convolution ``conv``, its parameters and not a copy of them; it must satisfy :func:`is_patch_conv`."""
        module = cls.__new__(cls)
        module.__dict__.update(conv.__dict__)
        module._copy = Copy()
        module.backend = backend
        return module

    def pack(self, *weights: Tensor | None) -> Tensor:
        (weight,) = weights
        assert weight is not None
        return torch.ops.repavit_ops.patch_projection_pack(weight.flatten(1))

    def no_rows(self) -> tuple[int, ...]:
        return 0, self.in_channels, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        if is_proxy(x):
            return call_of(self, x)
        packed, (weight,) = self.current()
        self.check_trainable(x)
        y = ops.patch_projection(
            x,
            weight.flatten(1),
            self.bias,
            **self._static(),
            packed=packed,
            backend=self.backend_for(x),
        )
        return y.permute(0, 3, 1, 2)

    def _static(self) -> dict[str, Any]:
        patch = (self.kernel_size[0], self.kernel_size[1])
        return {"patch": patch, "channels_last": False, "norm_eps": None}


def is_patch_conv(module: nn.Module) -> bool:
    """Whether a module is exactly an ``nn.Conv2d`` over patches that neither overlap nor leave gaps."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride
        and module.groups == 1
        and tuple(module.dilation) == (1, 1)
        and module.padding in ((0, 0), "valid")
    )
