"""Ablation of RePaViT's Table 5: train the FFN directly in its deployed shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reparam import Affine, MergedFFN, fold_affine_into_input, fold_identity, fold_output_scale
from .branch import ResidualBranch
from .channel_idle_ffn import affine_of
from .mode import require_eval
from .norm import TokenBatchNorm
from .partial_gelu_ffn import PartialGELUFFN


class DeployedShapeFFN(ResidualBranch):
    """Trainable FFN of (2μ + 1)C² weights: ``fc3(gelu(fc2(n))) + fc1(n) (+ x)`` with n = BN(x) or x.

    "Training RePa" of RePaViT's Table 5, "BatchNorm RePa" being ``batchnorm=False``. Keys are those of the authors'
    deployed form, plus ``norm``.

    Shapes:
        x, returns  [..., dim]
        fc1.weight [dim, dim], fc2.weight [act_channels, dim], fc3.weight [dim, act_channels] (no bias)

    Args:
        dim: C.
        act_channels: m.
        batchnorm: keep a BatchNorm in front.
        bn_eps: its variance offset.
        approximate: "none" (erf GELU) or "tanh".
        residual, skip_lam, layer_scale, drop_path: as :class:`ResidualBranch`.
    """

    def __init__(
        self,
        dim: int,
        act_channels: int,
        *,
        batchnorm: bool = True,
        bn_eps: float = 1e-5,
        approximate: str = "none",
        residual: bool = True,
        skip_lam: float = 1.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, residual=residual, skip_lam=skip_lam, layer_scale=layer_scale, drop_path=drop_path)
        self.dim, self.act_channels, self.approximate = dim, act_channels, approximate
        self.norm = TokenBatchNorm(dim, eps=bn_eps) if batchnorm else None
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, act_channels)
        self.fc3 = nn.Linear(act_channels, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x if self.norm is None else self.norm(x)
        y = self.fc3(F.gelu(self.fc2(n), approximate=self.approximate)) + self.fc1(n)
        return self.close(x, y)

    @torch.no_grad()
    def fuse(self) -> PartialGELUFFN:
        """Fold the BatchNorm, the scales and the shortcut: the deployed plain-PyTorch form, exactly.

        Raises:
            RuntimeError: the module is in training mode.
            ValueError: a merged weight is not finite; names it and what to check.
        """
        require_eval(self)
        dtype = self.fc1.weight.dtype
        one = torch.ones(self.dim, dtype=torch.float64, device=self.fc1.weight.device)
        affine = Affine(one, torch.zeros_like(one)) if self.norm is None else affine_of(self.norm)
        w_in, b_in = fold_affine_into_input(self.fc2.weight, self.fc2.bias, affine)
        w_merged, bias = fold_affine_into_input(self.fc1.weight, self.fc1.bias, affine)
        w_out = self.fc3.weight.detach().double()
        if (scale := self.output_scale()) is not None:
            w_out, _ = fold_output_scale(w_out, None, scale)
            w_merged, bias = fold_output_scale(w_merged, bias, scale)
        folds = self.residual and torch.finfo(dtype).bits >= 32
        merged = MergedFFN(
            w_in, b_in, w_out, fold_identity(w_merged) if folds else w_merged, bias, self.residual and not folds
        )
        return PartialGELUFFN.from_merged(merged, dtype=dtype, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, act_channels={self.act_channels}, residual={self.residual}"
