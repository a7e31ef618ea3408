"""Vision Transformers of few, wide-trained blocks: parallel branches that merge into one once joined."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..nn import Block, JoinedBranchAttention, JoinedBranchFFN
from .feed_forward import Form
from .vit import VisionTransformer


def joined_block(
    dim: int,
    num_heads: int,
    hidden: int,
    act_channels: int | None,
    form: Form,
    *,
    branches: int,
    norm_eps: float,
    qkv_bias: bool,
    **branch: Any,
) -> nn.Module:
    """One block of ``branches`` attention branches, then as many FFN branches; arguments as ``vit_block``."""
    if form != "training":
        raise ValueError(f"form: got {form!r}, wanted 'training' for joined branches; merge with reparameterize(model)")
    return Block(
        JoinedBranchAttention(dim, num_heads, branches, norm_eps=norm_eps, qkv_bias=qkv_bias, **branch),
        JoinedBranchFFN(dim, hidden, branches, act_channels=act_channels, norm_eps=norm_eps, **branch),
    )


class JoinedVisionTransformer(VisionTransformer):
    """ViT whose blocks hold B parallel branches, joined by :func:`repavit_ops.nn.set_join` as training goes on.

    Merged at α = 1, each block costs what one branch costs ("Rethinking Vision Transformer Depth via Structural
    Reparameterization", arXiv 2511.19718): a 12-block ViT becomes 12 / B blocks.

    Args:
        branches: B.
        config: of :class:`VisionTransformer`; form is "training" and idle channels need no join.
    """

    def __init__(self, *, branches: int, **config: Any) -> None:
        super().__init__(block=partial(joined_block, branches=branches), **config)
        self.branches = branches
