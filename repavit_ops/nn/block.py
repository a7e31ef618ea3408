"""A transformer block: two sub-blocks that each hold their own norm and shortcut."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .given import tell_unfused
from .packed_weights import PackedWeights


class Block(nn.Module):
    """``mlp(attn(x))``: both halves are closed (norm, branch, scale and shortcut inside), so each can be swapped alone.

    The authors' ViT block in training, and what a fused block of any family becomes.
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if any(isinstance(part, PackedWeights) for part in self.modules()):
            tell_unfused(self, *args[:2], *args[4:6])
