"""Unmerged computations in float64, written as the papers write them, and random weights for the reparam tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repavit_ops.reparam import Affine, AttentionWeights, MergedFFN, batchnorm_affine, layernorm_affine

EXACT = 1e-10  # relative, float64: the bound every fold has to meet


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| / max |wanted|, 0 for empty tensors."""
    assert got.shape == wanted.shape
    if wanted.numel() == 0:
        return 0.0
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))


class Draw:
    """A seeded source of float64 weights, statistics and inputs, scaled as in a trained network."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64) * std

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def weight(self, fan_out: int, fan_in: int) -> Tensor:
        return self.normal(fan_out, fan_in, std=max(fan_in, 1) ** -0.5)

    def batchnorm(self, dim: int, low: float = 0.3, high: float = 2.0) -> nn.BatchNorm1d:
        """PyTorch's own BatchNorm in eval mode with random affine and statistics; the variance is in [low, high]."""
        norm = nn.BatchNorm1d(dim, dtype=torch.float64).eval().requires_grad_(False)
        norm.weight.copy_(1 + self.normal(dim))
        norm.bias.copy_(self.normal(dim))
        norm.running_mean.copy_(self.normal(dim))
        norm.running_var.copy_(self.uniform(dim, low=low, high=high))
        return norm

    def layernorm(self, dim: int, eps: float = 1e-6) -> nn.LayerNorm:
        norm = nn.LayerNorm(dim, eps=eps, dtype=torch.float64).requires_grad_(False)
        norm.weight.copy_(1 + self.normal(dim))
        norm.bias.copy_(self.normal(dim))
        return norm


def apply_norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    """A norm over the last dimension of [..., C]; None is the identity."""
    if isinstance(norm, nn.BatchNorm1d):
        return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
    return x if norm is None else norm(x)


def affine_of(norm: nn.Module | None) -> Affine | None:
    """The fold of a norm; None stays None."""
    if isinstance(norm, nn.BatchNorm1d):
        return batchnorm_affine(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    return None if norm is None else layernorm_affine(norm.weight, norm.bias)


def core(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def partial_gelu(h: Tensor, m: int) -> Tensor:
    return torch.cat([F.gelu(h[..., :m]), h[..., m:]], dim=-1)


def merged_ffn(x: Tensor, merged: MergedFFN) -> Tensor:
    """What a `MergedFFN` means, in the dtype of x."""
    y = F.linear(F.gelu(F.linear(x, merged.w_in, merged.b_in)), merged.w_out, merged.bias)
    if merged.w_merged is not None:
        y = y + x @ merged.w_merged.T
    return y + x if merged.residual else y


def split_heads(rows: Tensor, num_heads: int) -> Tensor:
    """[..., T, h·d] → [..., h, T, d]."""
    return rows.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, attn_bias: Tensor | None = None) -> Tensor:
    """Explicit softmax over heads [..., h, T, d]; returns [..., T, h·d_v]."""
    scores = scale * q @ k.transpose(-1, -2)
    if attn_bias is not None:
        scores = scores + attn_bias
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def attention(x: Tensor, weights: AttentionWeights, attn_bias: Tensor | None = None) -> Tensor:
    """What `AttentionWeights` mean, without norm or shortcut."""
    h = weights.num_heads
    rows = [h * weights.d_qk, h * weights.d_qk, weights.w_proj.shape[1]]
    q, k, v = (split_heads(t, h) for t in F.linear(x, weights.w_qkv, weights.b_qkv).split(rows, dim=-1))
    return F.linear(softmax_attention(q, k, v, weights.scale, attn_bias), weights.w_proj, weights.b_proj)
