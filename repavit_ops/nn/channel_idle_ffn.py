"""Training form of RePaViT's FFN: most hidden channels skip the activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reparam import Affine, active_channels, batchnorm_affine, merge_channel_idle_ffn
from .branch import ResidualBranch
from .mode import require_eval
from .norm import TokenBatchNorm
from .partial_gelu_ffn import PartialGELUFFN


class ChannelIdleFFN(ResidualBranch):
    """FFN whose first m hidden channels are activated and whose others stay idle (RePaViT, eq. 2)::

        h = fc1(BN1(x))
        y = fc2(BN2([gelu(h[:m]), h[m:]])) (+ x)

    Slices instead of masking, so it does no more work than a vanilla FFN; its two BatchNorms still make it 13 to 30 %
    slower than one, so deploy what :meth:`fuse` returns.

    Shapes:
        x, returns  [..., dim]
        norm1 [dim], fc1.weight [hidden, dim], norm2 [hidden], fc2.weight [dim, hidden]   (the authors' keys)

    Args:
        dim: C.
        hidden: ρC.
        act_channels: m, hidden channels that pass the activation; or
        idle_ratio: θ = 1 - m / hidden, with m = ceil(hidden · (1 - θ)) as the authors compute it. Give one of the two.
        bn_eps: variance offset of both BatchNorms.
        approximate: "none" (erf GELU) or "tanh".
        drop: dropout probability after the activation and after fc2.
        residual, skip_lam, layer_scale, drop_path: as :class:`ResidualBranch`.

    Raises:
        ValueError: not exactly one of act_channels and idle_ratio is given, or it is out of range.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act_channels: int | None = None,
        idle_ratio: float | None = None,
        bn_eps: float = 1e-5,
        approximate: str = "none",
        drop: float = 0.0,
        residual: bool = True,
        skip_lam: float = 1.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, residual=residual, skip_lam=skip_lam, layer_scale=layer_scale, drop_path=drop_path)
        self.dim, self.hidden = dim, hidden
        self.act_channels = resolve_act_channels(hidden, act_channels, idle_ratio)
        self.approximate = approximate
        self.norm1 = TokenBatchNorm(dim, eps=bn_eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.norm2 = TokenBatchNorm(hidden, eps=bn_eps)
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        active, idle = self.fc1(self.norm1(x)).split([self.act_channels, self.hidden - self.act_channels], dim=-1)
        h = torch.cat((F.gelu(active, approximate=self.approximate), idle), dim=-1)
        return self.close(x, self.drop(self.fc2(self.drop(self.norm2(h)))))

    @torch.no_grad()
    def fuse(self, fold_identity: bool | None = None) -> PartialGELUFFN:
        """Merge into the deployed plain-PyTorch form, exactly (RePaViT, eqs. 3 to 6).

        Args:
            fold_identity: whether the shortcut becomes part of w_merged; default: yes in float32 and float64, no in
                bf16 and fp16, where rounding 1 + w would lose w.

        Raises:
            RuntimeError: the module is in training mode.
            ValueError: a merged weight is not finite; names it and what to check.
        """
        require_eval(self)
        dtype = self.fc1.weight.dtype
        merged = merge_channel_idle_ffn(
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.act_channels,
            input_affine=affine_of(self.norm1),
            hidden_affine=affine_of(self.norm2),
            output_scale=self.output_scale(),
            shortcut=self.residual,
            fold_identity=torch.finfo(dtype).bits >= 32 if fold_identity is None else fold_identity,
        )
        return PartialGELUFFN.from_merged(merged, dtype=dtype, approximate=self.approximate, hidden=self.hidden)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}, act_channels={self.act_channels}, residual={self.residual}"


def affine_of(norm: nn.BatchNorm1d) -> Affine:
    """Scale and shift that a BatchNorm applies in evaluation, in float64."""
    return batchnorm_affine(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def resolve_act_channels(hidden: int, act_channels: int | None, idle_ratio: float | None) -> int:
    """m from exactly one of ``act_channels`` and ``idle_ratio``; ValueError otherwise."""
    if (act_channels is None) == (idle_ratio is None):
        raise ValueError(
            f"act_channels, idle_ratio: got {act_channels} and {idle_ratio}, wanted exactly one of the two"
        )
    if idle_ratio is not None:
        return active_channels(hidden, idle_ratio)
    if act_channels is None or not 0 <= act_channels <= hidden:
        raise ValueError(f"act_channels: got {act_channels}, wanted 0 <= m <= hidden = {hidden}")
    return act_channels
