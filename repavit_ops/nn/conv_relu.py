"""A convolution and its ReLU in one call of oneDNN, for what stands in front of the patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import Backend
from .plain_call import why_not_plain


class ConvReLU2d(nn.Conv2d):
    """``relu(conv(x))``; on the CPU in one call whose result is channels-last in memory, as the next one wants it.

    Under gradients, autocast and ``torch.compile``, which fuses the two by itself, and where oneDNN does not take the
    dtype or the padding, it is the formula in PyTorch.

    Shapes:
        x, returns  [B, in_channels, H, W] → [B, out_channels, H', W']

    Args:
        args, config: of ``nn.Conv2d``.
        backend: "reference" for PyTorch's formula in every case.
    """

    def __init__(self, *args: Any, backend: Backend = "auto", **config: Any) -> None:
        super().__init__(*args, **config)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self._in_one_call(x):
            return F.relu(super().forward(x))
        x = x.contiguous(memory_format=torch.channels_last)
        where = (self.padding, self.stride, self.dilation, self.groups)
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *where, "relu", [], "")

    def _in_one_call(self, x: Tensor) -> bool:
        return (
            self.backend in ("auto", "cpp")
            and x.is_cpu
            and x.dim() == 4
            and x.numel() > 0
            and x.dtype == self.weight.dtype
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and _onednn_takes(x.dtype)
            and why_not_plain(self, x) is None
        )


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
