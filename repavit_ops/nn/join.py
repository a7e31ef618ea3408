"""What joined branches share: the coefficient α, κ, one norm core with an affine per branch, the checks of merging."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import backends
from ..reparam import Affine, compose, fold_affine_into_input, layernorm_affine
from .branch import ResidualBranch
from .channel_idle_ffn import affine_of
from .given import unwrapped
from .mode import require_eval
from .norm import TokenBatchNorm

Kappa = Literal["mean", "sum"]
Norm = Literal["layernorm", "batchnorm"]


class JoinedBranches(ResidualBranch):
    """Base of B branches that read the same n(x) and are joined by α at the input of their nonlinearity::

        t_b ← (1 - α) t_b + α κ Σ t        t_b = W_b (γ_b n(x) + β_b) + bias_b

    Everything in front of the nonlinearity is linear in n(x), so γ, β and α act on the weights, once per forward and
    differentiably, and the branches run as one wide layer. At α = 1 they are one branch and run at its width.

    α is the buffer ``alpha``, set by :func:`set_join` and carried by checkpoints, with a copy in Python so that a
    forward waits for no device. Eager calls notice any other in-place write (a moving average of the buffers, say);
    compiled ones see :func:`set_join` and loading only.

    Shapes:
        norm_weight, norm_bias  [B, dim]   γ_b, β_b; None without a norm
        alpha                   []         float64, whatever dtype the module is cast to

    Args:
        dim: C.
        branches: B.
        kappa: "mean" for κ = 1/B, "sum" for κ = 1.
        norm: core of n, "layernorm" or "batchnorm", shared by the branches; None for n(x) = x.
        norm_eps: its variance offset.
        bypass: add a linear map of n(x), one for all branches: ``bypass(n(x))`` [dim, dim].
        residual, skip_lam, layer_scale, drop_path: as :class:`ResidualBranch`.

    Raises:
        ValueError: branches < 1, or an unknown kappa or norm.
    """

    alpha: Tensor

    def __init__(
        self,
        dim: int,
        branches: int,
        *,
        kappa: Kappa,
        norm: Norm | None,
        norm_eps: float,
        bypass: bool,
        residual: bool,
        skip_lam: float,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__(dim, residual=residual, skip_lam=skip_lam, layer_scale=layer_scale, drop_path=drop_path)
        if branches < 1:
            raise ValueError(f"branches: got {branches}, wanted a number >= 1")
        if kappa not in ("mean", "sum"):
            raise ValueError(f"kappa: got {kappa!r}, wanted 'mean' (1 / branches) or 'sum' (1)")
        self.dim, self.branches = dim, branches
        self.kappa = 1 / branches if kappa == "mean" else 1.0
        self.norm = _norm_core(norm, dim, norm_eps)
        self.norm_weight = nn.Parameter(torch.ones(branches, dim)) if norm is not None else None
        self.norm_bias = nn.Parameter(torch.zeros(branches, dim)) if norm is not None else None
        self.bypass = nn.Linear(dim, dim) if bypass else None
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float64))
        self._alpha, self._alpha_stamp = 0.0, self._stamp()

    # --- α ------------------------------------------------------------------------------------------------------------

    @property
    def join(self) -> float:
        """α as a Python number; reads the buffer only after something wrote to it."""
        if not torch.compiler.is_compiling() and self._alpha_stamp != self._stamp():
            self._read_alpha()
        return self._alpha

    @join.setter
    def join(self, alpha: float) -> None:
        with torch.no_grad():
            self.alpha.fill_(alpha)
        self._alpha, self._alpha_stamp = alpha, self._stamp()

    def _read_alpha(self) -> None:
        if not self.alpha.is_meta:
            self._alpha = float(self.alpha)
        self._alpha_stamp = self._stamp()

    def _stamp(self) -> tuple[int, int | None]:
        return self.alpha.data_ptr(), None if self.alpha.is_inference() else self.alpha._version

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_alpha()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JoinedBranches:
        # a cast of the module must not round α (0.999 would become 1 in bf16), and mps knows no float64
        alpha, self.alpha = self.join, self.alpha.float()
        super()._apply(fn, recurse)
        device = self.alpha.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.alpha = torch.tensor(alpha, dtype=dtype, device=device)
        self._alpha_stamp = self._stamp()
        return self

    # --- training form: weights, not activations, are folded and mixed ------------------------------------------------

    def fold_norm(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """``W_b diag(γ_b)`` and ``bias_b + W_b β_b`` for stacked weight [B, out, dim] and bias [B, out]."""
        if self.norm_weight is None or self.norm_bias is None:
            return weight, bias
        # branch by branch: a batch of matrix-vector products would run as a batch of GEMMs, five times as slow
        shift = torch.stack([w @ b for w, b in zip(weight, self.norm_bias, strict=True)])
        return weight * self.norm_weight.unsqueeze(1), bias + shift

    def mix(self, t: Tensor) -> Tensor:
        """``(1 - α) t_b + α κ Σ t`` of a stack [B, ...], as one product over the branches: one pass, not four."""
        alpha = self.join
        if alpha == 0:
            return t
        mixing = (1 - alpha) * torch.eye(self.branches, dtype=t.dtype, device=t.device) + alpha * self.kappa
        device = t.device.type
        with torch.autocast(device, enabled=False) if backends.has_autocast(device) else nullcontext():
            return (mixing @ t.flatten(1)).view(t.shape)  # weights stay in float32 until they are used

    # --- merging ------------------------------------------------------------------------------------------------------

    @property
    def norm_eps(self) -> float | None:
        """eps of the LayerNorm core that merging leaves in front; None where nothing is left (BatchNorm, no norm)."""
        return self.norm.eps if isinstance(self.norm, nn.LayerNorm) else None

    def require_joined(self) -> None:
        """Raise RuntimeError, naming the fix, in training mode or unless α is exactly 1."""
        require_eval(self)
        if self.join != 1:
            raise RuntimeError(
                f"{type(self).__name__} cannot be merged: its join coefficient alpha is {self.join!r}, wanted exactly "
                "1, since below 1 the branches differ at the input of their nonlinearity; raise it during training, "
                "hold it at 1 for the last epochs, and call set_join(model, 1.0) at the end of training"
            )

    def branch_affines(self) -> list[Affine | None]:
        """What merging folds in front of each branch: γ_b, β_b, under a BatchNorm with its statistics; float64."""
        if self.norm_weight is None or self.norm_bias is None:
            return [None] * self.branches
        own = [layernorm_affine(g, b) for g, b in zip(self.norm_weight, self.norm_bias, strict=True)]
        core = self._core_affine()
        return [a if core is None else compose(core, a) for a in own]

    def merged_bypass(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the bypass, under a BatchNorm with its statistics folded, in float64; None without one."""
        if self.bypass is None:
            return None
        core = self._core_affine()
        if core is None:
            return self.bypass.weight.double(), self.bypass.bias.double()
        return fold_affine_into_input(self.bypass.weight, self.bypass.bias, core)

    def folds_identity(self, dtype: torch.dtype, wanted: bool | None) -> bool:
        """Whether the shortcut joins a merged linear path: it must read x itself; default no in bf16 and fp16."""
        return self.residual and self.norm_eps is None and (torch.finfo(dtype).bits >= 32 if wanted is None else wanted)

    def _core_affine(self) -> Affine | None:
        return affine_of(self.norm) if isinstance(self.norm, TokenBatchNorm) else None


def set_join(model: nn.Module, alpha: float) -> int:
    """Set the join coefficient α of every joined-branch module of ``model``; returns how many there are.

    Raise it from 0 to 1 over training and hold it at 1 for the last epochs; merging is exact at 1 and refused below.
    A model in any wrapper or sharded will do: α is a buffer, which each process has whole and sets for itself.

    Raises:
        ValueError: alpha lies outside [0, 1], or the model has no joined branches.
    """
    alpha = float(alpha)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha:g}, wanted the join coefficient, in [0, 1]")
    joined = [module for module in model.modules() if isinstance(module, JoinedBranches)]
    if not joined:
        raise ValueError(
            f"model: got {type(unwrapped(model)).__name__} without joined branches, wanted one with JoinedBranchFFN or "
            "JoinedBranchAttention (merging replaces them: set alpha on the training model)"
        )
    for module in joined:
        module.join = alpha
    return len(joined)


def _norm_core(norm: Norm | None, dim: int, eps: float) -> nn.Module:
    """The norm without its affine."""
    if norm == "layernorm":
        return nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
    if norm == "batchnorm":
        return TokenBatchNorm(dim, eps=eps, affine=False)
    if norm is None:
        return nn.Identity()
    raise ValueError(f"norm: got {norm!r}, wanted 'layernorm', 'batchnorm' or None")
