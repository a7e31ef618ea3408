"""Merging is exact in evaluation only: BatchNorm's batch statistics, Dropout and DropPath have no merged form."""

from __future__ import annotations

from torch import nn


def require_eval(module: nn.Module) -> None:
    """Raise RuntimeError, naming the submodule and the fix, unless every submodule is in evaluation mode."""
    for name, child in module.named_modules():
        if child.training:
            where = f"its submodule {name!r}" if name else "it"
            raise RuntimeError(
                f"{type(module).__name__} cannot be merged: {where} is in training mode, where BatchNorm uses batch "
                "statistics and Dropout is random; call model.eval() first"
            )
