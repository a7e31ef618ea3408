"""Joined branches: B parallel FFNs or attentions that read the same X become one (Zhou et al. 2025, arXiv 2511.19718).

What the branches share decides what merges:

    same pre-activation (α = 1)        one FFN or attention of one branch's size     join_ffn, join_attention_a
    same scores, own values            one attention, heads B times as wide          join_attention_b
    nothing but the input (any α)      one FFN B times as wide, or B·H heads         widen_ffn, widen_heads

α is the join coefficient that training raises from 0 to 1: branch b uses ``(1-α) t_b + α κ Σ t`` at the input of its
nonlinearity, with κ = 1/B (mean) or 1 (sum). For α < 1 nothing merges to one branch's size, and merging refuses.

All branches read n(X), one LayerNorm core, or X itself under BatchNorm; each branch's own affine is folded first. The
shortcut is no part of a join: whether the block adds X once or each branch did (B·X) is the caller's to know and add.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .affine import Affine, affine_as_float64
from .attention import AttentionWeights, attention_weights, fold_input_affine
from .ffn import MergedFFN, merge_channel_idle_ffn
from .precision import as_float64, bias_as_float64


class FFNBranch(NamedTuple):
    """One FFN of a joined block: ``GELU(fc1(norm(X)))`` then fc2.

    Shapes:
        w1 [hidden, C], b1 [hidden] or None; w2 [C, hidden], b2 [C] or None (fold a norm or scale next to fc2 first)
        affine [C]: gamma and beta of the branch's LayerNorm, or its whole BatchNorm; None for none
        norm_eps: eps of the LayerNorm core that the branches share; None without a core
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    affine: Affine | None = None
    norm_eps: float | None = None


class AttentionBranch(NamedTuple):
    """One attention of a joined block.

    Shapes:
        w_qkv [h·(2·d_qk + d_v), C], b_qkv [rows] or None; w_proj [C_out, h·d_v], b_proj [C_out] or None
        affine, norm_eps: as in `FFNBranch`; scale None is 1 / sqrt(d_qk)
    """

    w_qkv: Tensor
    b_qkv: Tensor | None
    w_proj: Tensor
    b_proj: Tensor | None
    affine: Affine | None
    num_heads: int
    norm_eps: float | None = None
    scale: float | None = None


Branch = TypeVar("Branch", FFNBranch, AttentionBranch)


# --- FFN --------------------------------------------------------------------------------------------------------------


def join_ffn(
    branches: Sequence[FFNBranch],
    kappa: float | None = None,
    *,
    alpha: Tensor | float = 1.0,
    act_channels: int | None = None,
) -> MergedFFN:
    """Merge FFN branches joined at α = 1 into one of a single branch's width.

    ``Σ_b GELU(κ Σ_b' h_b') W2_b = GELU(h) W2``: ``W1 = κ Σ W1_b``, ``b1 = κ Σ b1_b``, ``W2 = Σ W2_b``, ``b2 = Σ b2_b``.

    Args:
        branches: read the same n(X) or X; equal shapes and eps.
        kappa: 1 sums the pre-activations, None is the mean, 1 / B.
        alpha: the join coefficient of the trained module; anything but 1 raises.
        act_channels: with idle channels (RePaViT) too, the first m of each branch are activated and joined. The idle
            ones keep their own branch's h_b; they need no join, ``Σ_b A2_b A1_b`` over them is one C x C matrix.

    Returns:
        MergedFFN in float64 without shortcut (``residual=False``, no identity folded): add X, or B·X, yourself.

    Raises:
        ValueError: alpha != 1, no branch, or branches that differ; names the argument and the branch.
    """
    _require_joined(alpha, "one FFN of a branch's width", "widen_ffn")
    parts = _ffn_parts(branches, act_channels)
    kappa = _kappa(kappa, len(parts))
    return MergedFFN(
        w_in=kappa * _sum(p.w_in for p in parts),
        b_in=kappa * _sum(p.b_in for p in parts),
        w_out=_sum(p.w_out for p in parts),
        w_merged=_linear_path(parts),
        bias=_sum(p.bias for p in parts),
    )


def widen_ffn(
    branches: Sequence[FFNBranch],
    alpha: Tensor | float = 0.0,
    kappa: float | None = None,
    *,
    act_channels: int | None = None,
) -> MergedFFN:
    """Write FFN branches at any α as one FFN B times as wide, exactly: the branches side by side.

    ``W1_b ← (1-α) W1_b + α κ Σ W1``, stacked by rows; W2_b stacked by columns. One wide GEMM pair instead of B narrow
    ones, so it serves the training form too (it is differentiable).

    Args and returns as `join_ffn`; w_in is [B·m, C].

    Raises:
        ValueError: alpha outside [0, 1], no branch, or branches that differ; names the argument and the branch.
    """
    parts = _ffn_parts(branches, act_channels)
    alpha, kappa = _coefficient(alpha), _kappa(kappa, len(parts))
    return MergedFFN(
        w_in=torch.cat(_mix([p.w_in for p in parts], alpha, kappa)),
        b_in=torch.cat(_mix([p.b_in for p in parts], alpha, kappa)),
        w_out=torch.cat([p.w_out for p in parts], dim=1),
        w_merged=_linear_path(parts),
        bias=_sum(p.bias for p in parts),
    )


def _ffn_parts(branches: Sequence[FFNBranch], act_channels: int | None) -> list[MergedFFN]:
    """Fold each branch's affine and idle channels: B merged FFNs with equal w_in shapes and no shortcut."""
    first = _first(branches)
    dim = as_float64(first.w1, "branches[0].w1", hidden=None, C=None).shape[1]
    m = first.w1.shape[0] if act_channels is None else act_channels
    parts = []
    for i, b in enumerate(branches):
        # Joined channels must match one by one; idle ones join nothing, so with them the hidden sizes may differ.
        hidden = m if act_channels is None else None
        w1 = as_float64(b.w1, f"branches[{i}].w1", hidden=hidden, C=dim)
        w2 = as_float64(b.w2, f"branches[{i}].w2", C=dim, hidden=w1.shape[0])
        b1, b2 = bias_as_float64(b.b1, f"branches[{i}].b1", w1), bias_as_float64(b.b2, f"branches[{i}].b2", w2)
        affine = None if b.affine is None else affine_as_float64(b.affine, f"branches[{i}].affine", dim)
        parts.append(merge_channel_idle_ffn(w1, b1, w2, b2, m, input_affine=affine, shortcut=False))
    return parts


def _linear_path(parts: list[MergedFFN]) -> Tensor | None:
    """Sum of the branches' C x C idle matrices; None when no branch has idle channels."""
    matrices = [p.w_merged for p in parts if p.w_merged is not None]
    return _sum(matrices) if matrices else None


# --- Attention --------------------------------------------------------------------------------------------------------


def join_attention_a(
    branches: Sequence[AttentionBranch], kappa: float | None = None, *, alpha: Tensor | float = 1.0
) -> AttentionWeights:
    """Join A: branches that share joined q, k and v at α = 1 merge into one attention of a branch's size.

    ``Q = κ Σ Q_b``, K and V likewise, each branch its own Wo_b: ``W_qkv = κ Σ W_qkv_b``, ``W_proj = Σ Wo_b``. Exact
    only for a training graph that uses the joined q and k itself (their product holds cross terms of branches).

    Args:
        branches: read the same n(X) or X; equal shapes, heads, scale and eps.
        kappa: 1 sums q, k and v, None is the mean, 1 / B.
        alpha: the join coefficient of the trained module; anything but 1 raises.

    Returns:
        AttentionWeights in float64. The shortcut, X or B·X, stays with the caller.

    Raises:
        ValueError: alpha != 1, no branch, or branches that differ; names the argument and the branch.
    """
    _require_joined(alpha, "one attention of a branch's size", "widen_heads")
    parts = _attention_parts(branches)
    kappa = _kappa(kappa, len(parts))
    return parts[0]._replace(
        w_qkv=kappa * _sum(p.w_qkv for p in parts),
        b_qkv=kappa * _sum(p.b_qkv for p in parts),
        w_proj=_sum(p.w_proj for p in parts),
        b_proj=_sum(p.b_proj for p in parts),
    )


def join_attention_b(branches: Sequence[AttentionBranch], *, alpha: Tensor | float = 1.0) -> AttentionWeights:
    """Join B: branches that share summed scores and keep their own values merge into heads B times as wide.

    ``softmax(scale Σ_b Q_b K_bᵀ)`` is the attention of ``[Q_1 … Q_B]`` and ``[K_1 … K_B]`` with d_qk = B·d and the OLD
    scale 1 / sqrt(d); values are stacked to d_v = B·d_v and Wo with them. Summing the weights instead is wrong.

    Args, returns and raises as `join_attention_a`.
    """
    _require_joined(alpha, "one attention with wider heads", "widen_heads where the branches keep their own scores")
    parts = _attention_parts(branches)
    first = parts[0]
    return first._replace(
        w_qkv=torch.cat([_stack_in_heads([p.w_qkv[r] for p in parts], first.num_heads) for r in _qkv(first)]),
        b_qkv=torch.cat([_stack_in_heads([p.b_qkv[r] for p in parts], first.num_heads) for r in _qkv(first)]),
        w_proj=_stack_in_heads([p.w_proj.T for p in parts], first.num_heads).T,
        b_proj=_sum(p.b_proj for p in parts),
        d_qk=len(parts) * first.d_qk,
    )


def widen_heads(
    branches: Sequence[AttentionBranch], alpha: Tensor | float = 0.0, kappa: float | None = None
) -> AttentionWeights:
    """Write branches with their own softmax as one attention with B·H heads, exactly, at any α of join A.

    ``W_qkv_b ← (1-α) W_qkv_b + α κ Σ W_qkv``; heads stand branch by branch (head b·H + h), Wo_b side by side. A
    per-head attn_bias [H, T, T] is repeated in that order. α = 0, the default, is independent branches.

    Args, returns and raises as `join_attention_a`, except that any alpha in [0, 1] will do.
    """
    parts = _attention_parts(branches)
    alpha, kappa = _coefficient(alpha), _kappa(kappa, len(parts))
    w_qkv = _mix([p.w_qkv for p in parts], alpha, kappa)
    b_qkv = _mix([p.b_qkv for p in parts], alpha, kappa)
    return parts[0]._replace(
        w_qkv=torch.cat([w[r] for r in _qkv(parts[0]) for w in w_qkv]),
        b_qkv=torch.cat([b[r] for r in _qkv(parts[0]) for b in b_qkv]),
        w_proj=torch.cat([p.w_proj for p in parts], dim=1),
        b_proj=_sum(p.b_proj for p in parts),
        num_heads=len(parts) * parts[0].num_heads,
    )


def _attention_parts(branches: Sequence[AttentionBranch]) -> list[AttentionWeights]:
    """Check the branches against the first and fold each one's affine."""
    first = _first(branches)
    parts: list[AttentionWeights] = []
    for i, b in enumerate(branches):
        name = f"branches[{i}]"
        if b.num_heads != first.num_heads:
            raise ValueError(f"{name}.num_heads: got {b.num_heads}, wanted {first.num_heads} as in branches[0]")
        rows, dim = first.w_qkv.shape
        w_qkv = as_float64(b.w_qkv, f"{name}.w_qkv", rows=rows, C=dim)
        w_proj = as_float64(b.w_proj, f"{name}.w_proj", C_out=first.w_proj.shape[0], h_d_v=first.w_proj.shape[1])
        b_qkv = bias_as_float64(b.b_qkv, f"{name}.b_qkv", w_qkv)
        b_proj = bias_as_float64(b.b_proj, f"{name}.b_proj", w_proj)
        weights = attention_weights(w_qkv, b_qkv, w_proj, b_proj, b.num_heads, scale=b.scale)
        if parts and weights.scale != parts[0].scale:
            raise ValueError(f"{name}.scale: got {weights.scale:g}, wanted {parts[0].scale:g} as in branches[0]")
        if b.affine is not None:
            weights = fold_input_affine(weights, affine_as_float64(b.affine, f"{name}.affine", dim))
        parts.append(weights)
    return parts


def _qkv(weights: AttentionWeights) -> tuple[slice, slice, slice]:
    return weights.q, weights.k, weights.v


def _stack_in_heads(rows: list[Tensor], num_heads: int) -> Tensor:
    """B tensors [h·d, ...] → [h·B·d, ...]: inside each head the branches' rows follow one another."""
    return torch.cat([r.unflatten(0, (num_heads, -1)) for r in rows], dim=1).flatten(0, 1)


# --- Shared -----------------------------------------------------------------------------------------------------------


def _mix(tensors: list[Tensor], alpha: float, kappa: float) -> list[Tensor]:
    """``(1-α) t_b + α κ Σ t`` for each branch b."""
    joined = alpha * kappa * _sum(tensors)
    return [(1 - alpha) * t + joined for t in tensors]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _first(branches: Sequence[Branch]) -> Branch:
    """The branch the others are held against, once it is known that there is one and that they share a norm core."""
    if not branches:
        raise ValueError("branches: got none, wanted at least one")
    for i, b in enumerate(branches):
        if b.norm_eps != branches[0].norm_eps:
            raise ValueError(
                f"branches[{i}].norm_eps: got {b.norm_eps}, wanted {branches[0].norm_eps} as in branches[0]: the "
                "branches share one LayerNorm core"
            )
    return branches[0]


def _kappa(kappa: float | None, num_branches: int) -> float:
    return 1 / num_branches if kappa is None else float(kappa)


def _coefficient(alpha: Tensor | float) -> float:
    if not 0.0 <= float(alpha) <= 1.0:
        raise ValueError(f"alpha: got {float(alpha):g}, wanted the join coefficient, in [0, 1]")
    return float(alpha)


def _require_joined(alpha: Tensor | float, merged: str, alternative: str) -> None:
    if float(alpha) != 1.0:
        raise ValueError(
            f"alpha: got {float(alpha):.9g}, wanted exactly 1: below 1 the branches differ at the input of the "
            f"nonlinearity and {merged} cannot equal them; raise the join schedule to 1 and hold it there before "
            f"merging, or use {alternative}"
        )
