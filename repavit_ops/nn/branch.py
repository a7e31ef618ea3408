"""What every residual branch shares: LayerScale, division by λ, DropPath and the shortcut."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .norm import refuse_conversion


class ResidualBranch(nn.Module):
    """Base of a sub-block: ``x + DropPath(ls · f(x)) / λ``, or without ``x +`` when ``residual`` is off.

    Args:
        dim: channels that LayerScale scales.
        residual: whether the shortcut is added.
        skip_lam: λ of LV-ViT; 1 elsewhere.
        layer_scale: initial value of the LayerScale vector ``ls`` [dim]; None for no LayerScale.
        drop_path: probability of dropping the branch of an image during training.
    """

    def __init__(
        self, dim: int, *, residual: bool, skip_lam: float, layer_scale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path: got {drop_path}, wanted a probability in [0, 1)")
        if skip_lam == 0:
            raise ValueError("skip_lam: got 0, wanted the number that the branch is divided by (1 for none)")
        self.residual, self.skip_lam, self.drop_path = residual, skip_lam, drop_path
        self.ls = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale is not None else None

    def add_module(self, name: str, module: nn.Module | None) -> None:
        refuse_conversion(name, self._modules.get(name), module)
        super().add_module(name, module)

    def close(self, x: Tensor, y: Tensor) -> Tensor:
        """Finish the branch: scale its output y, drop it by image in training, add the shortcut x."""
        if self.ls is not None:
            y = y * self.ls
        if self.skip_lam != 1:
            y = y / self.skip_lam
        if self.training and self.drop_path > 0:
            keep = 1.0 - self.drop_path
            y = y * y.new_empty((y.shape[0],) + (1,) * (y.dim() - 1)).bernoulli_(keep).div_(keep)
        return x + y if self.residual else y

    def output_scale(self) -> Tensor | float | None:
        """Factor ls / λ of the branch in evaluation: per channel in float64, or one number; None when it is one."""
        if self.ls is not None:
            return self.ls.detach().double() / self.skip_lam
        return None if self.skip_lam == 1 else 1 / self.skip_lam
