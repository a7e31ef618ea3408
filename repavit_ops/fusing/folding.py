"""The parts of a sub-block in, one fused module out: which folds each kind takes, and why one cannot be fused.

A rule (:mod:`repavit_ops.fusing.rules`) reads the parts of a module: norm, matrices, scales. What can be fused and how
is then the same for every family.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import reparam
from ..backends import Backend
from ..nn import Attention, PartialGELUFFN, QuickGELU, RepAttention, RepBN, TokenBatchNorm, WindowRepAttention
from ..nn.channel_idle_ffn import affine_of
from ..nn.foreign_block import BiasedAttention
from ..reparam import Affine, AttentionWeights


@dataclass(frozen=True)
class AttentionParts:
    """``x + output_scale · proj(softmax(scale · q kᵀ + bias) v)`` with q, k, v = qkv(norm(x)); head-major rows.

    Without norm, output_scale and residual it is the attention alone.

    ``keep_v_bias`` where callers may mask a row wholly: its output is then proj(0), without the V bias.
    """

    qkv: nn.Module | tuple[nn.Module, nn.Module, nn.Module]  # one projection, or three
    proj: nn.Module
    num_heads: int
    d_qk: int
    scale: float
    keep_v_bias: bool = False
    takes_bias: bool = False  # what is fused becomes a BiasedAttention, with ``bias`` [1, h, T, T] or without
    bias: Tensor | None = None
    norm: nn.Module = field(default_factory=nn.Identity)
    output_scale: Tensor | float | None = None
    residual: bool = False


@dataclass(frozen=True)
class WindowParts:
    """What a window attention has beside its :class:`AttentionParts`."""

    attention: AttentionParts
    rel_bias: Tensor  # [h, wh·ww, wh·ww]
    window: tuple[int, int]
    shift: tuple[int, int]
    roll_first: bool = False
    static_shift: bool = False
    shift_by_axis: bool = False


@dataclass(frozen=True)
class FFNParts:
    """``x + output_scale · fc2(act(fc1(norm(x))))``; without norm, output_scale and residual the FFN alone."""

    fc1: nn.Module
    act: nn.Module
    fc2: nn.Module
    norm: nn.Module = field(default_factory=nn.Identity)
    output_scale: Tensor | float | None = None
    residual: bool = False


# --- what cannot be folded, and why -----------------------------------------------------------------------------------


def reason_against(parts: AttentionParts | WindowParts | FFNParts) -> str | None:
    """Why a sub-block of these parts cannot be fused, in one line; None if it can."""
    if isinstance(parts, WindowParts):
        parts = parts.attention
    linears = (parts.fc1, parts.fc2) if isinstance(parts, FFNParts) else (*_projections(parts), parts.proj)
    for part in linears:
        if type(part) is not nn.Linear:
            return f"a projection is {_named(type(part))}, wanted nn.Linear (merge adapters or dequantise first)"
    if type(parts.norm) not in (nn.Identity, nn.LayerNorm):
        return f"its norm {type(parts.norm).__name__} has no fold (LayerNorm has; BatchNorm folds in reparameterize)"
    if isinstance(parts.norm, nn.LayerNorm) and len(parts.norm.normalized_shape) != 1:
        return f"its LayerNorm spans {len(parts.norm.normalized_shape)} dimensions; only the last can be fused"
    if isinstance(parts, FFNParts) and gelu_variant(parts.act) is None:
        return f"its activation is {type(parts.act).__name__}; only GELU (erf, tanh or quick) can be fused"
    dim, dim_out = linears[0], linears[-1]
    if dim.in_features != dim_out.out_features and (parts.residual or isinstance(parts, FFNParts)):
        return f"it turns {dim.in_features} channels into {dim_out.out_features}; the fused form keeps them"
    return None


def _named(cls: type) -> str:
    """A class with its library where the name alone would mislead: peft's adapters are called Linear too."""
    return f"{cls.__module__}.{cls.__name__}" if cls.__name__ == "Linear" else cls.__name__


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ``nn.Linear`` on parameters that a module holds itself."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight, made.bias = (p if p is None else nn.Parameter(p.detach(), False) for p in (weight, bias))  # type: ignore[assignment]
    return made


def layer_norm(norm: Any) -> nn.LayerNorm:
    """An ``nn.LayerNorm`` on the parameters of another library's own."""
    made = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    made.weight, made.bias = norm.weight, norm.bias
    return made


def _projections(parts: AttentionParts) -> tuple[nn.Module, ...]:
    return parts.qkv if isinstance(parts.qkv, tuple) else (parts.qkv,)


def gelu_variant(act: nn.Module) -> str | None:
    """The form of a GELU as ``approximate`` names it; None for any other activation, subclasses included."""
    if type(act) is QuickGELU:
        return "quick"
    return act.approximate if type(act) is nn.GELU else None


# --- parts → fused module ---------------------------------------------------------------------------------------------


def fold_attention(parts: AttentionParts, backend: Backend) -> RepAttention | BiasedAttention:
    """Every fold of the attention algebra; the LayerNorm core and the shortcut stay, inside the operator."""
    affine, norm_eps = _norm_fold(parts.norm)
    weights = _folded(_weights_of(parts), affine, parts.output_scale, parts.keep_v_bias)
    fused = RepAttention(
        weights.w_qkv.shape[1],
        weights.num_heads,
        d_qk=weights.d_qk,
        d_v=weights.d_v,
        dim_out=weights.w_proj.shape[0],
        scale=weights.scale,
        norm_eps=norm_eps,
        residual=parts.residual,
        backend=backend,
        device="meta",
    )
    dtype = _dtype_of(parts.proj)
    fused = _filled(fused, weights, dtype)
    if not parts.takes_bias:
        return fused
    return BiasedAttention(fused, None if parts.bias is None else reparam.cast(parts.bias.detach(), dtype, "bias"))


def fold_window_attention(parts: WindowParts, backend: Backend) -> WindowRepAttention:
    """As :func:`fold_attention`; padded tokens keep the K and V they had before the norm's affine was folded."""
    affine, norm_eps = _norm_fold(parts.attention.norm)
    original = _weights_of(parts.attention)
    weights = _folded(original, affine, parts.attention.output_scale)
    fused = WindowRepAttention(
        weights.w_qkv.shape[1],
        weights.num_heads,
        parts.window,
        parts.shift,
        d_qk=weights.d_qk,
        d_v=weights.d_v,
        scale=weights.scale,
        norm_eps=norm_eps,
        residual=parts.attention.residual,
        padding=affine is not None,
        roll_first=parts.roll_first,
        static_shift=parts.static_shift,
        shift_by_axis=parts.shift_by_axis,
        backend=backend,
        device="meta",
    )
    dtype = _dtype_of(parts.attention.proj)
    fused.rel_bias = nn.Parameter(reparam.cast(parts.rel_bias, dtype, "rel_bias"))
    if affine is not None:
        pad_kv = reparam.pad_kv_vector(original, affine, weights)
        fused.pad_kv = nn.Parameter(reparam.cast(pad_kv, dtype, "pad_kv"))
    return _filled(fused, weights, dtype)


def fold_ffn(parts: FFNParts, backend: Backend) -> PartialGELUFFN:
    """A vanilla FFN is a channel-idle one with every channel active."""
    affine, norm_eps = _norm_fold(parts.norm)
    fc1, fc2 = parts.fc1, parts.fc2
    assert isinstance(fc1, nn.Linear)
    assert isinstance(fc2, nn.Linear)
    merged = reparam.merge_channel_idle_ffn(
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        fc1.out_features,
        input_affine=affine,
        output_scale=parts.output_scale,
        shortcut=parts.residual,
    )
    return PartialGELUFFN.from_merged(
        merged,
        dtype=fc1.weight.dtype,
        norm_eps=norm_eps,
        approximate=gelu_variant(parts.act) or "none",
        backend=backend,
    )


def _norm_fold(norm: nn.Module) -> tuple[Affine | None, float | None]:
    """The affine that folds into the next matrix (None: none), and the eps of the core that stays (None: no norm)."""
    if not isinstance(norm, nn.LayerNorm):
        return None, None
    if norm.weight is None:
        return None, norm.eps
    return reparam.layernorm_affine(norm.weight, norm.bias), norm.eps


def _weights_of(parts: AttentionParts) -> AttentionWeights:
    proj: Any = parts.proj
    qkv: list[Any] = list(_projections(parts))
    weight = torch.cat([part.weight for part in qkv])
    biases = [part.weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in qkv]
    bias = None if all(part.bias is None for part in qkv) else torch.cat(biases)
    return reparam.attention_weights(weight, bias, proj.weight, proj.bias, parts.num_heads, parts.d_qk, parts.scale)


def _folded(
    weights: AttentionWeights, affine: Affine | None, output_scale: Tensor | float | None, keep_v_bias: bool = False
) -> AttentionWeights:
    """All attention folds, in the one order that is exact."""
    if affine is not None:
        weights = reparam.fold_input_affine(weights, affine)
    weights = reparam.drop_k_bias(weights)
    weights = reparam.fold_scale(weights if keep_v_bias else reparam.move_v_bias(weights))
    return weights if output_scale is None else reparam.fold_attention_output_scale(weights, output_scale)


def _filled(module: Any, weights: AttentionWeights, dtype: torch.dtype) -> Any:
    for name in ("w_qkv", "b_qkv", "w_proj", "b_proj"):
        setattr(module, name, nn.Parameter(reparam.cast(getattr(weights, name), dtype, name)))
    return module


def _dtype_of(linear: nn.Module) -> torch.dtype:
    return next(linear.parameters()).dtype


# --- BatchNorm in front of attention ----------------------------------------------------------------------------------


def attention_parts(module: Attention) -> AttentionParts:
    """The parts of our training form."""
    return AttentionParts(
        module.qkv,
        module.proj,
        module.num_heads,
        module.d_qk,
        module.scale,
        norm=module.norm,
        output_scale=module.output_scale(),
        residual=module.residual,
    )


def fold_batchnorm(module: Attention) -> Attention:
    """Attention without its BatchNorm (or SLAB's RepBN): both fold wholly into qkv.

    Raises:
        ValueError: a folded weight is not finite; names it and what to check.
    """
    norm = module.norm
    assert isinstance(norm, TokenBatchNorm)
    affine = affine_of(norm)
    if isinstance(norm, RepBN):
        affine = reparam.repbn_affine(affine, norm.alpha)
    weights = reparam.fold_input_affine(_weights_of(attention_parts(module)), affine)
    merged = Attention(
        module.dim,
        module.num_heads,
        d_qk=module.d_qk,
        d_v=module.d_v,
        scale=module.scale,
        norm=None,
        residual=module.residual,
        skip_lam=module.skip_lam,
        drop_path=module.drop_path,
    )
    dtype = module.qkv.weight.dtype
    merged.qkv.weight = nn.Parameter(reparam.cast(weights.w_qkv, dtype, "qkv.weight"))
    merged.qkv.bias = nn.Parameter(reparam.cast(weights.b_qkv, dtype, "qkv.bias"))
    merged.proj, merged.ls = module.proj, module.ls
    return merged
