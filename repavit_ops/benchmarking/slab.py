"""SLAB's parts (Guo et al., ICML 2024), the peer of RePaViT's Table 3: norms that merge, and attention that is linear.

Training replaces LayerNorm step by step, ``λ LN(x) + (1 - λ) RepBN(x)`` with λ from 1 to 0 and
``RepBN(x) = BN(x) + η x``. At λ = 0 every norm is an affine map that folds into the linear layer behind it.
Attention has no softmax: ``relu(q) (relu(k + p)ᵀ v) / (relu(q) · Σ relu(k + p)) + DWConv(v)``, p a learnt position.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reparam
from ..nn import WindowAttention

KERNEL = 5  # of the convolution over values
EPS = 1e-6  # of attention's denominator

Norm = Callable[[int], nn.Module]  # a norm over so many channels
Model = TypeVar("Model", bound=nn.Module)


class RepBN(nn.Module):
    """``BN(x) + η x`` over the channels of tokens.

    Shapes:
        x  [B, T, C] → the same
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.eta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.transpose(1, 2)).transpose(1, 2) + self.eta * x


class ProgressiveNorm(nn.Module):
    """``λ LN(x) + (1 - λ) RepBN(x)``; :func:`set_progress` moves λ, a buffer, from 1 to 0.

    Shapes:
        x  [B, T, C] → the same
    """

    share: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.rep_bn = RepBN(dim)
        self.register_buffer("share", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.share * self.layer_norm(x) + (1 - self.share) * self.rep_bn(x)

    def affine(self) -> reparam.Affine:
        """The map that is left at λ = 0.

        Raises:
            ValueError: λ is not 0.
        """
        if self.share != 0:
            raise ValueError(f"model: got λ = {self.share.item():g}, wanted 0: call set_progress(model, 1.0) first")
        bn = self.rep_bn.bn
        affine = reparam.batchnorm_affine(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        return reparam.repbn_affine(affine, self.rep_bn.eta.detach())


def set_progress(model: nn.Module, done: float) -> None:
    """Set λ = 1 - done in every norm of a model.

    Args:
        done: share of the training steps that are over, in [0, 1].

    Raises:
        ValueError: done is outside [0, 1].
    """
    if not 0 <= done <= 1:
        raise ValueError(f"done: got {done}, wanted a share of the training in [0, 1]")
    for module in model.modules():
        if isinstance(module, ProgressiveNorm):
            module.share.fill_(1 - done)


class SimplifiedLinearAttention(nn.Module):
    """Attention without softmax, linear in the tokens; see the top of this file.

    Shapes:
        x  [B, T, C] → the same; T = grid², C divisible by num_heads
    """

    def __init__(self, dim: int, num_heads: int, grid: int) -> None:
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        head = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position = nn.Parameter(torch.zeros(1, grid * grid, dim))
        self.conv = nn.Conv2d(head, head, KERNEL, padding=KERNEL // 2, groups=head)  # one for all heads
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k = k + self.position
        q, k, v = (t.view(batch, tokens, self.num_heads, -1).transpose(1, 2) for t in (F.relu(q), F.relu(k), v))
        scale = 1 / (q @ k.sum(dim=2).unsqueeze(-1) + EPS)
        near = self.conv(v.transpose(2, 3).reshape(batch * self.num_heads, -1, self.grid, self.grid))
        out = q @ (k.transpose(2, 3) @ v) * scale + near.view(batch, self.num_heads, -1, tokens).transpose(2, 3)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class TokenWindowAttention(WindowAttention):
    """Swin's attention in windows, over the tokens of a square map: SLAB leaves it in the later stages.

    Shapes:
        x  [B, T, C] → the same; T = grid²
    """

    def __init__(self, dim: int, num_heads: int, grid: int, window: int, shift: int) -> None:
        super().__init__(dim, num_heads, window, shift)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(1, (self.grid, self.grid))).flatten(1, 2)


class Normed(nn.Module):
    """A part with norms of its own, which it can fold into its linear layers."""

    @abstractmethod
    def fold_norms(self) -> None:
        """Fold every norm, in place, and leave the identity."""


class SlabBlock(Normed):
    """``x + attn(norm1(x))``, then ``x + fc2(gelu(fc1(norm2(x))))``; ``norm`` builds both norms."""

    def __init__(
        self, dim: int, attn: SimplifiedLinearAttention | TokenWindowAttention, mlp_ratio: int, norm: Norm
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attn
        self.norm2 = norm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp_ratio * dim), nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def fold_norms(self) -> None:
        self.norm1 = folded(self.norm1, self.attn.qkv)
        self.norm2 = folded(self.norm2, self.fc1)


def folded(norm: nn.Module, linear: nn.Linear) -> nn.Identity:
    """What stands in a norm's place once it is in the linear layer behind it, which has a bias from then on."""
    assert isinstance(norm, ProgressiveNorm)
    w, b = reparam.fold_affine_into_input(linear.weight, linear.bias, norm.affine())
    linear.weight.copy_(w)
    linear.bias = nn.Parameter(b.to(linear.weight))
    return nn.Identity()


def folded_back(norm: nn.Module, conv: nn.Conv2d) -> nn.Identity:
    """The same of a norm behind a convolution."""
    assert isinstance(norm, ProgressiveNorm)
    w, b = reparam.fold_affine_into_output(conv.weight.flatten(1), conv.bias, norm.affine())
    conv.weight.copy_(w.view_as(conv.weight))
    conv.bias = nn.Parameter(b.to(conv.weight))
    return nn.Identity()


@torch.no_grad()
def merged(model: Model) -> Model:
    """A copy whose norms are folded into the layers beside them; the last one's mean over tokens commutes with it.

    Raises:
        ValueError: the model is not at λ = 0.
        RuntimeError: it is in training mode.
    """
    if model.training:
        raise RuntimeError("model: in training mode; call model.eval() first")
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Normed):
            module.fold_norms()
    return model
