"""Merging is exact in evaluation only: BatchNorm's batch statistics, Dropout and DropPath have no merged form."""

from __future__ import annotations

from torch import nn

from .branch import ResidualBranch

CHANGED_BY_TRAINING = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, ResidualBranch)


def require_eval(module: nn.Module, purpose: str = "merged") -> None:
    """Raise RuntimeError, naming the place and the fix, if the module or a part that this changes is in training."""
    for name, child in module.named_modules():
        if child.training and (not name or isinstance(child, CHANGED_BY_TRAINING)):
            where = f"its submodule {name!r}" if name else "it"
            raise RuntimeError(
                f"{type(module).__name__} cannot be {purpose}: {where} is in training mode, where BatchNorm uses batch "
                "statistics and Dropout is random; call model.eval() first"
            )
