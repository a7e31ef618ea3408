"""The activation of OpenAI's CLIP."""

from __future__ import annotations

from torch import Tensor, nn

from .. import reference


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``: an approximation of GELU that OpenAI trained CLIP with. +inf gives +inf, -inf NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.gelu(x, "quick")
