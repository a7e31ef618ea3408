"""Norms of the training forms: BatchNorm over the channels of tokens, and SLAB's RepBN."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
