"""Training form of an FFN of joined branches: several FFNs that become one by the end of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reparam import FFNBranch, MergedFFN, fold_output_scale, join_ffn, merge_ffn_bypass
from ..reparam import fold_identity as with_identity
from .channel_idle_ffn import resolve_act_channels
from .init import linear_init_
from .join import JoinedBranches, Kappa, Norm
from .partial_gelu_ffn import PartialGELUFFN

HIDDEN_IN_CACHE = 1 << 21  # hidden channels of some tokens, from one product to the next: 8 MiB in fp32


class JoinedBranchFFN(JoinedBranches):
    """B parallel FFNs, joined by α in front of the activation (Zhou et al. 2025, arXiv 2511.19718)::

        h_b = fc1_b(γ_b n(x) + β_b)
        H_b = (1 - α) h_b + α κ Σ h
        y   = Σ_b fc2_b([gelu(H_b[:m]), h_b[m:]]) [+ bypass(n(x))] (+ x)

    α rises from 0 to 1 over training (:func:`set_join`); at 1 the branches are exactly one FFN of width ``hidden``.
    For every α they are one FFN of width B·hidden, so they run as one pair of GEMMs. Idle channels (RePaViT) are
    linear, need no join, and run as the one C x C matrix they are.

    Shapes:
        x, returns  [..., dim]
        fc1_weight  [B, hidden, dim];  fc1_bias [B, hidden]
        fc2_weight  [B, dim, hidden];  fc2_bias [B, dim]
        norm_weight, norm_bias [B, dim], alpha [], bypass  as :class:`JoinedBranches`

    Args:
        dim: C.
        hidden: ρC of one branch.
        branches: B.
        act_channels: m, hidden channels of a branch that pass the activation; or
        idle_ratio: θ = 1 - m / hidden. Give one of the two, or neither for no idle channels.
        kappa, norm, norm_eps, bypass: as :class:`JoinedBranches`.
        approximate: "none" (erf GELU) or "tanh".
        drop: dropout probability of activated channels and of the branches' sum; idle channels are not dropped.
        residual, skip_lam, layer_scale, drop_path: as :class:`ResidualBranch`.

    Raises:
        ValueError: both act_channels and idle_ratio are given or one is out of range; as :class:`JoinedBranches`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        branches: int,
        *,
        act_channels: int | None = None,
        idle_ratio: float | None = None,
        kappa: Kappa = "mean",
        norm: Norm | None = "layernorm",
        norm_eps: float = 1e-6,
        approximate: str = "none",
        drop: float = 0.0,
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
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate: got {approximate!r}, wanted 'none' (erf) or 'tanh'")
        if act_channels is None and idle_ratio is None:
            act_channels = hidden
        self.hidden, self.act_channels = hidden, resolve_act_channels(hidden, act_channels, idle_ratio)
        self.approximate = approximate
        self.fc1_weight = nn.Parameter(torch.empty(branches, hidden, dim))
        self.fc1_bias = nn.Parameter(torch.empty(branches, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(branches, dim, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(branches, dim))
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each branch's matrices as ``nn.Linear`` does."""
        linear_init_(self.fc1_weight, self.fc1_bias)
        linear_init_(self.fc2_weight, self.fc2_bias)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        w1, b1 = self.fold_norm(self.fc1_weight, self.fc1_bias)
        w_in, b_in, w_out = self._activated(w1, b1)
        w_linear, bias = self._linear(w1, b1)
        y = self._gemm_pair(z, w_in, b_in, w_out, bias)
        if w_linear is not None:
            y = y + F.linear(z, w_linear)
        return self.close(x, self.drop(y))

    def _gemm_pair(self, z: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, bias: Tensor) -> Tensor:
        """fc1, activation and fc2 of all branches; on a CPU some tokens at a time, whose hidden channels it caches."""
        tokens = HIDDEN_IN_CACHE // max(1, w_in.shape[0])
        if z.device.type != "cpu" or torch.compiler.is_compiling() or z.numel() <= tokens * self.dim:
            return self._activate(z, w_in, b_in, w_out, bias)
        parts = z.flatten(0, -2).split(max(1, tokens))
        return torch.cat([self._activate(part, w_in, b_in, w_out, bias) for part in parts]).view(z.shape)

    def _activate(self, z: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, bias: Tensor) -> Tensor:
        h = F.gelu(F.linear(z, w_in, b_in), approximate=self.approximate)
        return F.linear(self.drop(h), w_out, bias)

    def _activated(self, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activated channels: [m, dim], [m], [dim, m] at α = 1, else the branches' side by side, B·m for m."""
        m = self.act_channels
        w1, b1, w2 = w1[:, :m], b1[:, :m], self.fc2_weight[..., :m]
        if self.join == 1:
            return self.kappa * w1.sum(0), self.kappa * b1.sum(0), w2.sum(0)
        return self.mix(w1).flatten(0, 1), self.mix(b1).flatten(), w2.movedim(0, 1).flatten(1)

    def _linear(self, w1: Tensor, b1: Tensor) -> tuple[Tensor | None, Tensor]:
        """What passes no activation: idle channels and bypass as one [dim, dim] (or None), and every output bias."""
        m, bias = self.act_channels, self.fc2_bias.sum(0)
        w_linear = None
        if m < self.hidden:
            # side by side over branches: Σ_b A2_b A1_b and Σ_b A2_b c1_b are one product each
            a2 = self.fc2_weight[..., m:].movedim(0, 1).flatten(1)
            w_linear, bias = a2 @ w1[:, m:].flatten(0, 1), bias + a2 @ b1[:, m:].flatten()
        if self.bypass is not None:
            w_linear = self.bypass.weight if w_linear is None else w_linear + self.bypass.weight
            bias = bias + self.bypass.bias
        return w_linear, bias

    @torch.no_grad()
    def fuse(self, fold_identity: bool | None = None) -> PartialGELUFFN:
        """Merge into one FFN of one branch's width, in plain PyTorch, exactly.

        Args:
            fold_identity: whether the shortcut becomes part of w_merged, where there is one and it reads x (not under
                a LayerNorm); default: yes in float32 and float64, no in bf16 and fp16, where 1 + w would lose w.

        Raises:
            RuntimeError: the module is in training mode, or α is not 1.
            ValueError: a merged weight is not finite; names it and what to check.
        """
        self.require_joined()
        merged = join_ffn(self._branches(), self.kappa, act_channels=self.act_channels)
        if (bypass := self.merged_bypass()) is not None:
            merged = merge_ffn_bypass(merged, *bypass)
        if (scale := self.output_scale()) is not None:
            merged = _scaled(merged, scale)
        dtype = self.fc1_weight.dtype
        if merged.w_merged is not None and self.folds_identity(dtype, fold_identity):
            merged = merged._replace(w_merged=with_identity(merged.w_merged))
        else:
            merged = merged._replace(residual=self.residual)
        return PartialGELUFFN.from_merged(
            merged, dtype=dtype, norm_eps=self.norm_eps, approximate=self.approximate
        ).eval()

    def _branches(self) -> list[FFNBranch]:
        weights = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, self.branch_affines())
        return [FFNBranch(*parts, self.norm_eps) for parts in zip(*weights, strict=True)]

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden={self.hidden}, branches={self.branches}, act_channels={self.act_channels}, "
            f"kappa={self.kappa:g}, residual={self.residual}"
        )


def _scaled(merged: MergedFFN, scale: Tensor | float) -> MergedFFN:
    """LayerScale or 1/λ into everything but the shortcut."""
    w_out, bias = fold_output_scale(merged.w_out, merged.bias, scale)
    w_merged = None if merged.w_merged is None else fold_output_scale(merged.w_merged, None, scale)[0]
    return merged._replace(w_out=w_out, w_merged=w_merged, bias=bias)
