"""Training form of an attention of joined branches, and what it merges into."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import attention_core
from ..reparam import (
    AttentionBranch,
    AttentionWeights,
    cast,
    fold_attention_output_scale,
    fold_output_scale,
    join_attention_a,
    join_attention_b,
    merge_attention_bypass,
)
from .attention import Attention
from .init import linear_init_
from .join import JoinedBranches, Kappa, Norm

Join = Literal["a", "b"]
SCORES_IN_CACHE = 1 << 19  # of joined scores, from their product to the softmax and back: 2 MiB in fp32


class Operands(NamedTuple):
    """What one call of the attention core takes: the branches laid out as heads."""

    w_qkv: Tensor
    b_qkv: Tensor
    w_proj: Tensor
    num_heads: int
    d_qk: int
    scale: float


class JoinedBranchAttention(JoinedBranches):
    """B parallel attentions of h heads, joined by α in front of the softmax (Zhou et al. 2025, arXiv 2511.19718)::

        q_b, k_b, v_b = qkv_b(γ_b n(x) + β_b)                  d = dim / h,  s_b = q_b k_bᵀ / √d
        join A:  q, k, v ← (1 - α) q_b + α κ Σ q, k and v alike    y = Σ_b proj_b(softmax(s_b + attn_bias) v_b)
        join B:  s ← (1 - α) s_b + α κ Σ s                         y = Σ_b proj_b(softmax(s_b + attn_bias) v_b)
        returns  y [+ bypass(n(x))] (+ x)

    α rises from 0 to 1 over training (:func:`set_join`). At 1, join A is exactly one attention of one branch's size;
    join B, where each branch keeps its own values, is one whose heads are B times as wide, at the old scale times κ.
    Below 1 the branches run as B·h heads of one attention.

    Shapes:
        x, returns   [N, T, dim]
        qkv_weight   [B, 3·dim, dim], rows q | k | v, head-major in each;  qkv_bias [B, 3·dim] or None
        proj_weight  [B, dim, dim];  proj_bias [B, dim]
        attn_bias    broadcastable to [N, h, T, T], or None: the same for every branch
        norm_weight, norm_bias [B, dim], alpha [], bypass  as :class:`JoinedBranches`

    Args:
        dim: C.
        num_heads: h of one branch.
        branches: B.
        join: "a" joins queries, keys and values; "b" joins scores.
        kappa, norm, norm_eps, bypass: as :class:`JoinedBranches`.
        qkv_bias: whether qkv has a bias.
        residual, skip_lam, layer_scale, drop_path: as :class:`ResidualBranch`.

    Raises:
        ValueError: dim is not divisible by num_heads, or join is unknown; as :class:`JoinedBranches`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        branches: int,
        *,
        join: Join = "a",
        kappa: Kappa = "mean",
        norm: Norm | None = "layernorm",
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        bypass: bool = False,
        residual: bool = True,
        skip_lam: float = 1.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            branches,
            kappa=kappa,
            norm=norm,
            norm_eps=norm_eps,
            bypass=bypass,
            residual=residual,
            skip_lam=skip_lam,
            layer_scale=layer_scale,
            drop_path=drop_path,
        )
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads} for dim {dim}, wanted a divisor of dim")
        if join not in ("a", "b"):
            raise ValueError(f"join: got {join!r}, wanted 'a' (joined q, k, v) or 'b' (joined scores)")
        self.num_heads, self.d_qk, self.joins_scores = num_heads, dim // num_heads, join == "b"
        self.scale = self.d_qk**-0.5
        self.qkv_weight = nn.Parameter(torch.empty(branches, 3 * dim, dim))
        self.qkv_bias = nn.Parameter(torch.empty(branches, 3 * dim)) if qkv_bias else None
        self.proj_weight = nn.Parameter(torch.empty(branches, dim, dim))
        self.proj_bias = nn.Parameter(torch.empty(branches, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each branch's matrices as ``nn.Linear`` does."""
        linear_init_(self.qkv_weight, self.qkv_bias)
        linear_init_(self.proj_weight, self.proj_bias)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        z = self.norm(x)
        b_qkv = self.qkv_weight.new_zeros(self.qkv_weight.shape[:2]) if self.qkv_bias is None else self.qkv_bias
        w, b = self.fold_norm(self.qkv_weight, b_qkv)
        core = self._joined(w, b) if self.join == 1 else self._apart(w, b)
        qkv = F.linear(z, core.w_qkv, core.b_qkv)
        if self.joins_scores and 0 < self.join < 1:
            o = self._attend_by_joined_scores(qkv, attn_bias)
        else:
            bias = attn_bias if self.join == 1 else self._repeat_heads(attn_bias)
            o = attention_core(qkv, bias, core.num_heads, core.d_qk, core.scale)
        y = F.linear(o, core.w_proj, self.proj_bias.sum(0))
        if self.bypass is not None:
            y = y + self.bypass(z)
        return self.close(x, y)

    def _joined(self, w: Tensor, b: Tensor) -> Operands:
        """α = 1: h heads, of one branch's width (A) or with the branches side by side inside each head (B)."""
        if not self.joins_scores:
            w, b, w_proj = self.kappa * w.sum(0), self.kappa * b.sum(0), self.proj_weight.sum(0)
            return Operands(w, b, w_proj, self.num_heads, self.d_qk, self.scale)
        w, b = (self._heads(t).movedim(0, 2).flatten(0, 3) for t in (w, b))
        w_proj = self.proj_weight.unflatten(2, (self.num_heads, self.d_qk)).movedim(0, 2).flatten(1)
        return Operands(w, b, w_proj, self.num_heads, self.branches * self.d_qk, self.kappa * self.scale)

    def _apart(self, w: Tensor, b: Tensor) -> Operands:
        """α < 1: B·h heads, branch by branch; join A mixes their weights, join B their scores, later."""
        if not self.joins_scores:
            w, b = self.mix(w), self.mix(b)
        w, b = (self._heads(t).transpose(0, 1).flatten(0, 3) for t in (w, b))
        w_proj = self.proj_weight.movedim(0, 1).flatten(1)
        return Operands(w, b, w_proj, self.branches * self.num_heads, self.d_qk, self.scale)

    def _heads(self, t: Tensor) -> Tensor:
        """[B, 3·dim, ...] → [B, 3, h, d, ...]."""
        return t.unflatten(1, (3, self.num_heads, self.d_qk))

    def _attend_by_joined_scores(self, qkv: Tensor, attn_bias: Tensor | None) -> Tensor:
        """Join B for 0 < α < 1: [N, T, q | k | v] of B·h heads → [N, T, B·h·d], a few images at a time.

        One fused attention could do it on concatenated heads (``[c_bb' k_b']``, d_qk = B·d), with B times the work in
        q kᵀ and, as d_qk ≠ d_v, no flash kernel on a CPU: twice as slow at B = 4 as mixing the scores.
        """
        images = count = qkv.shape[0]
        if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
            count = max(1, SCORES_IN_CACHE // max(1, self.branches * self.num_heads * qkv.shape[1] ** 2))
        if count >= images:
            return self._attend(qkv, attn_bias)
        chunks = qkv.split(count)
        per_image = attn_bias is not None and attn_bias.dim() == 4 and attn_bias.shape[0] > 1
        biases = attn_bias.split(count) if attn_bias is not None and per_image else [attn_bias] * len(chunks)
        return torch.cat([self._attend(chunk, bias) for chunk, bias in zip(chunks, biases, strict=True)])

    def _attend(self, qkv: Tensor, attn_bias: Tensor | None) -> Tensor:
        heads = qkv.unflatten(-1, (3, self.branches, self.num_heads, self.d_qk))
        q, k, v = heads.permute(2, 3, 0, 4, 1, 5)  # [B, N, h, T, d] each
        scores = self.mix((self.scale * q) @ k.transpose(-1, -2))
        if attn_bias is None:
            p = scores.softmax(-1)
        else:  # a wholly masked row gives 0, as everywhere, and no NaN reaches its gradient
            masked = (attn_bias == -torch.inf).all(-1, keepdim=True)
            p = (scores + attn_bias.masked_fill(masked, 0.0)).softmax(-1).masked_fill(masked, 0.0)
        return (p @ v).permute(1, 3, 0, 2, 4).flatten(2)

    def _repeat_heads(self, attn_bias: Tensor | None) -> Tensor | None:
        """attn_bias of h heads for the B·h heads of the branches."""
        if attn_bias is None or attn_bias.dim() < 3 or attn_bias.shape[-3] == 1:
            return attn_bias
        return torch.cat([attn_bias] * self.branches, dim=-3)

    @torch.no_grad()
    def fuse(self, fold_identity: bool | None = None) -> Attention | BypassedAttention:
        """Merge into one attention, in plain PyTorch, exactly: :class:`Attention`, or with a bypass
        :class:`BypassedAttention`, since no attention can hold a linear path.

        Args:
            fold_identity: with a bypass, as :meth:`JoinedBranchFFN.fuse`; without one the shortcut stays as it is.

        Raises:
            RuntimeError: the module is in training mode, or α is not 1.
            ValueError: a merged weight is not finite; names it and what to check.
        """
        self.require_joined()
        dtype, scale = self.qkv_weight.dtype, self.output_scale()
        join = (
            join_attention_b(self._branches()) if self.joins_scores else join_attention_a(self._branches(), self.kappa)
        )
        if scale is not None:
            join = fold_attention_output_scale(join, scale)
        if (bypass := self.merged_bypass()) is None:
            return _attention(join, dtype, self.norm_eps, self.residual)
        if scale is not None:
            bypass = fold_output_scale(*bypass, scale)
        merged = merge_attention_bypass(
            join, *bypass, shortcut=self.residual, fold_identity=self.folds_identity(dtype, fold_identity)
        )
        attn = _attention(merged.weights, dtype, None, False)
        return BypassedAttention(attn, cast(merged.w_merged, dtype, "w_merged"), self.norm_eps, merged.residual).eval()

    def _branches(self) -> list[AttentionBranch]:
        b_qkv = [None] * self.branches if self.qkv_bias is None else self.qkv_bias
        # join B sums scores, so its κ is a factor of theirs
        scale = self.kappa * self.scale if self.joins_scores else self.scale
        weights = (self.qkv_weight, b_qkv, self.proj_weight, self.proj_bias, self.branch_affines())
        return [
            AttentionBranch(*parts, num_heads=self.num_heads, norm_eps=self.norm_eps, scale=scale)
            for parts in zip(*weights, strict=True)
        ]

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, branches={self.branches}, "
            f"join={'b' if self.joins_scores else 'a'!r}, kappa={self.kappa:g}, residual={self.residual}"
        )


class BypassedAttention(nn.Module):
    """Attention with a linear path beside it: ``attn(z) + z W_mergedᵀ (+ x)`` with z = LayerNorm core of x, or x.

    What a joined attention with a bypass merges into. A linear path cannot enter the softmax, so the sum itself fuses
    no further; ``attn``, an :class:`Attention` without norm and shortcut, does.

    Shapes:
        x, returns  [N, T, dim]
        w_merged    [dim, dim]
        attn_bias   broadcastable to [N, h, T, T], or None
    """

    def __init__(self, attn: Attention, w_merged: Tensor, norm_eps: float | None, residual: bool) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm_eps is None else _layer_norm_core(attn.dim, norm_eps)
        self.attn = attn
        self.w_merged = nn.Parameter(w_merged)
        self.residual = residual

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        z = self.norm(x)
        y = self.attn(z, attn_bias) + F.linear(z, self.w_merged)
        return x + y if self.residual else y


def _attention(weights: AttentionWeights, dtype: torch.dtype, norm_eps: float | None, residual: bool) -> Attention:
    """The plain module that holds float64 weights, each rounded once to dtype."""
    with torch.device("meta"):  # the parameters are replaced below; this draws no random numbers
        module = Attention(
            weights.w_qkv.shape[1],
            weights.num_heads,
            d_qk=weights.d_qk,
            d_v=weights.d_v,
            scale=weights.scale,
            norm=None if norm_eps is None else lambda dim: _layer_norm_core(dim, norm_eps),
            residual=residual,
        )
    for linear, w, b in ((module.qkv, "w_qkv", "b_qkv"), (module.proj, "w_proj", "b_proj")):
        linear.weight = nn.Parameter(cast(getattr(weights, w), dtype, w))
        linear.bias = nn.Parameter(cast(getattr(weights, b), dtype, b))
    return module.eval()


def _layer_norm_core(dim: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
