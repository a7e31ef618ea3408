"""Deployed form of the channel-idle FFN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import Backend
from ..ops import _check
from ..reparam import MergedFFN, cast, fold_identity, unfold_identity
from ..stack_plan import Step
from .dropped_weight import DroppedWeight
from .given import is_plain
from .init import linear_init_
from .packed_weights import PackedWeights
from .symbolic import call_of, is_proxy

AS_MERGED, TAKEN_OUT = 2, 3  # versions of state dicts: w_merged as it was merged, and without the shortcut
NO_FORM = (
    "the state dict does not say which it is (its _metadata, which torch.save keeps): load it into a model of the kind "
    "that it was taken from, fused in float32 or not, and pass that one's state_dict() on"
)


class PartialGELUFFN(PackedWeights):
    """Deployed channel-idle FFN: ``gelu(z W_inᵀ + b_in) W_outᵀ + z W_mergedᵀ + bias`` (RePaViT, eq. 6).

    z is x, or its LayerNorm or RMSNorm core when ``norm_eps`` is given. Also a vanilla FFN (``merged=False``,
    ``norm_eps``, ``residual=True``) and, with ``act_channels=0``, the purely linear layer of θ = 1. With
    ``backend="reference"`` it is plain PyTorch, which is what :func:`repavit_ops.reparameterize` returns;
    :func:`repavit_ops.fuse` sets kernels.

    Shapes:
        x         [..., dim]   fp32 | bf16 | fp16 | fp64
        w_in      [act_channels, dim];  b_in [act_channels] or None
        w_out     [dim, act_channels]
        w_merged  [dim, dim] or None;   bias [dim] or None
        returns   [..., dim]

    Args:
        dim: C, channels of a token.
        act_channels: m, hidden channels that pass the activation.
        bias: whether b_in and bias exist.
        merged: whether w_merged, the idle path, exists.
        norm_eps: variance offset of the LayerNorm core in front; None for no norm.
        residual: add x (when the shortcut is not folded into w_merged).
        norm: "layer" or "rms" (RMSNorm): the core that ``norm_eps`` asks for.
        approximate: form of GELU: "none" (erf), "tanh" or "quick" (``x sigmoid(1.702 x)``).
        quantize: "int8": the packed copy, z and H in whole numbers; the plain weights stay what they are.
        backend: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError: dim or act_channels is negative, approximate is unknown; at a call, as the operator does.
    """

    operator = "partial_gelu_ffn"
    norm, quantize = "layer", "none"  # of older pickles
    packed_names = ("w_in", "w_out", "w_merged")

    def __init__(
        self,
        dim: int,
        act_channels: int,
        bias: bool = True,
        merged: bool = True,
        norm_eps: float | None = None,
        residual: bool = False,
        approximate: str = "none",
        *,
        norm: str = "layer",
        quantize: str = "none",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 0 or act_channels < 0:
            raise ValueError(f"dim, act_channels: got {dim}, {act_channels}, wanted numbers >= 0")
        _check.gelu_form(approximate)
        _check.norm(norm_eps, norm)
        _check.form_of_quantize(quantize)
        self.dim, self.act_channels = dim, act_channels
        self.norm_eps, self.residual, self.approximate, self.norm = norm_eps, residual, approximate, norm
        self.quantize = quantize
        self.backend = backend
        self.hidden: int | None = None  # ρC of the training form it was merged from, where that is known

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.w_in = parameter(act_channels, dim)
        self.b_in = parameter(act_channels) if bias else None
        self.w_out = parameter(dim, act_channels)
        self.w_merged = parameter(dim, dim) if merged else None
        self.bias = parameter(dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does."""
        linear_init_(self.w_in, self.b_in)
        linear_init_(self.w_out, self.bias)
        if self.w_merged is not None:
            linear_init_(self.w_merged, None)

    @classmethod
    def from_merged(
        cls,
        merged: MergedFFN,
        *,
        dtype: torch.dtype,
        norm_eps: float | None = None,
        norm: str = "layer",
        approximate: str = "none",
        hidden: int | None = None,
        backend: Backend = "reference",
    ) -> PartialGELUFFN:
        """Module that holds the float64 result of a merge, rounded once to ``dtype`` (see :mod:`repavit_ops.reparam`).

        ``hidden`` is ρC of the training form, kept for reports.

        Raises:
            ValueError: a value is not finite in ``dtype``; names the parameter and what to check.
        """
        module = cls(
            merged.bias.shape[0],
            merged.w_in.shape[0],
            merged=merged.w_merged is not None,
            norm_eps=norm_eps,
            norm=norm,
            residual=merged.residual,
            approximate=approximate,
            backend=backend,
            device="meta",
        )
        for name in ("w_in", "b_in", "w_out", "w_merged", "bias"):
            value = cast(getattr(merged, name), dtype, name)
            setattr(module, name, None if value is None else nn.Parameter(value))
        module.hidden = hidden
        return module

    def take_out_shortcut(self) -> None:
        """In float32, add x itself where it was folded into w_merged as + I: ``w_merged - I``, and ``residual``.

        The kernels add it in their epilogue at no cost. Folded, x passes a sum over C products, each rounded at x's
        size: behind 12 blocks five times the error. State dicts of both forms load into either
        (their ``_version`` tells them apart).
        """
        if self.w_merged is None or not is_plain(self.w_merged) or self.w_merged.dtype != torch.float32:
            return
        if self.residual or self.norm_eps is not None:
            return
        apart = unfold_identity(self.w_merged.detach()).float()
        self.w_merged = nn.Parameter(apart, self.w_merged.requires_grad)
        self.residual = True

    @property
    def _version(self) -> int:  # type: ignore[override]
        """What ``state_dict`` says of the form. It is 1 for any other module, as of a program with these weights."""
        return TAKEN_OUT if self.residual and self._may_hold_shortcut() else AS_MERGED

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        key, theirs = f"{prefix}w_merged", metadata.get("version")
        given = state_dict.get(key)
        known = theirs in (AS_MERGED, TAKEN_OUT)
        if given is None or not self._may_hold_shortcut():
            pass
        elif known and theirs != self._version:
            converted = unfold_identity if self.residual else fold_identity
            dtype = given.dtype if given.dtype.itemsize >= 4 else torch.float32  # 16 bits would lose w in 1 + w
            state_dict = {**state_dict, key: converted(given).to(dtype)}
        elif not known:
            own: Any = self.w_merged
            if self.residual and _holds_shortcut(given):
                args[-1].append(f"{key}: holds the shortcut, which this module adds by itself; {NO_FORM}")
            elif not self.residual and _holds_shortcut(own) and not _holds_shortcut(given):
                args[-1].append(f"{key}: is without the shortcut, which this module has in w_merged; {NO_FORM}")
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def _may_hold_shortcut(self) -> bool:
        return self.w_merged is not None and self.norm_eps is None

    def pack(self, *weights: Tensor | None) -> Tensor:
        return torch.ops.repavit_ops.partial_gelu_ffn_pack(*weights, quantize=self.quantize)

    def no_rows(self) -> tuple[int, ...]:
        return 0, self.dim

    def forward(self, x: Tensor) -> Tensor:
        if is_proxy(x):
            return call_of(self, x)
        packed, (w_in, w_out, w_merged) = self.current()
        self.check_trainable(x)
        return ops.partial_gelu_ffn(
            x,
            w_in,
            self.b_in,
            w_out,
            w_merged,
            self.bias,
            **self._static(),
            packed=packed,
            backend=self.backend_for(x),
        )

    def step(self, size: Sequence[int] = ()) -> Step:
        """This module's call as a step of :func:`repavit_ops.ops.fused_blocks`."""
        packed, (w_in, w_out, w_merged) = self.current()
        tensors = (w_in, self.b_in, w_out, w_merged, self.bias)
        return Step(self.operator, tensors, self._static(), packed, self._pytorch_at(*size, self.dim))

    def _static(self) -> dict[str, Any]:
        return {
            "norm_eps": self.norm_eps,
            "residual": self.residual,
            "approximate": self.approximate,
            "norm": self.norm,
            "quantize": self.quantize,
        }

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, act_channels={self.act_channels}, bias={self.bias is not None}, "
            f"merged={self.w_merged is not None}, norm_eps={self.norm_eps}, residual={self.residual}, "
            f"approximate={self.approximate!r}, quantize={self.quantize!r}, backend={self.backend!r}"
        )


def _holds_shortcut(w_merged: Tensor) -> bool:
    """Whether a merged matrix has the identity in it, as far as its diagonal tells: about 1 with it, else 0."""
    square = w_merged.dim() == 2 and w_merged.shape[0] == w_merged.shape[1] > 0
    if not square or w_merged.is_meta or isinstance(w_merged, DroppedWeight):
        return False
    return bool(w_merged.detach().diagonal().double().mean() > 0.5)
