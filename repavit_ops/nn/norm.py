"""Norms of the training forms: BatchNorm over the channels of tokens, and SLAB's RepBN."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def refuse_conversion(name: str, old: object, new: object) -> None:
    """Raise TypeError where ``nn.SyncBatchNorm.convert_sync_batchnorm`` puts its own norm in place of one of tokens."""
    if isinstance(old, TokenBatchNorm) and isinstance(new, nn.SyncBatchNorm):
        raise TypeError(
            f"{name}: got nn.SyncBatchNorm in place of {type(old).__name__}, which has its channels last"
            f"{' and adds alpha x' if isinstance(old, RepBN) else ''}; train with statistics per process, and call "
            "repavit_ops.recalibrate_bn(model, loader) before merging"
        )


class TokenBatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the last dimension of [..., C]: statistics over every token of every image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class RepBN(TokenBatchNorm):
    """SLAB's re-parameterized BatchNorm: ``BN(x) + alpha · x`` with one learnt scalar alpha [1]."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps=eps)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.alpha * x
