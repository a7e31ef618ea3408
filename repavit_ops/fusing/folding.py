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
from ..nn import (
    Attention,
    GatedFFN,
    PartialGELUFFN,
    QuickGELU,
    RepAttention,
    RepBN,
    TokenBatchNorm,
    WindowRepAttention,
)
from ..nn.channel_idle_ffn import affine_of
from ..nn.foreign_block import BiasedAttention
from ..reparam import Affine, AttentionWeights


@dataclass(frozen=True)
class AttentionParts:
    """``x + output_scale · proj(inner_norm(softmax(scale · q kᵀ + bias) v))``, q, k, v = qkv(norm(x)); head-major rows.

    Without norm, output_scale and residual it is the attention alone.

    ``keep_v_bias`` where callers may mask a row wholly: its output is then proj(0), without the V bias. ``q_norm`` and
    ``k_norm`` stand behind the projections, over each head; ``rotary_layout`` says how callers' tables pair channels.
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
    q_norm: nn.Module = field(default_factory=nn.Identity)
    k_norm: nn.Module = field(default_factory=nn.Identity)
    rotary_layout: str | None = None  # None: no rotation
    inner_norm: nn.Module = field(default_factory=nn.Identity)

    @property
    def turns(self) -> bool:
        """Whether anything happens to q and k between their projection and the scores."""
        return self.rotary_layout is not None or type(self.q_norm) is not nn.Identity


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


@dataclass(frozen=True)
class GatedFFNParts:
    """``x + output_scale · out(inner_norm(act(gate(z)) ∘ up(z)))``, z = norm(x); without the rest the FFN alone."""

    gate: nn.Module
    up: nn.Module
    act: nn.Module
    out: nn.Module
    inner_norm: nn.Module = field(default_factory=nn.Identity)
    norm: nn.Module = field(default_factory=nn.Identity)
    output_scale: Tensor | float | None = None
    residual: bool = False


AnyFFNParts = FFNParts | GatedFFNParts


# --- what cannot be folded, and why -----------------------------------------------------------------------------------


def reason_against(parts: AttentionParts | WindowParts | AnyFFNParts) -> str | None:
    """Why a sub-block of these parts cannot be fused, in one line; None if it can."""
    if isinstance(parts, WindowParts):
        parts = parts.attention
        if type(parts.inner_norm) is not nn.Identity:
            return "a norm stands between its windows and their projection; only attention without windows has one"
    linears = _linears(parts)
    for part in linears:
        if type(part) is not nn.Linear:
            return f"a projection is {_named(type(part))}, wanted nn.Linear (merge adapters or dequantise first)"
    if type(parts.norm) not in (nn.Identity, *NORMS):
        name = type(parts.norm).__name__
        return f"its norm {name} has no fold (LayerNorm and RMSNorm have; BatchNorm folds in reparameterize)"
    inner = nn.Identity() if isinstance(parts, FFNParts) else parts.inner_norm
    if type(inner) not in (nn.Identity, nn.LayerNorm):
        behind = "gate" if isinstance(parts, GatedFFNParts) else "softmax"
        return f"the norm behind its {behind} is {type(inner).__name__}; only LayerNorm can be fused"
    for norm in (parts.norm, inner):
        if isinstance(norm, NORMS) and len(norm.normalized_shape) != 1:
            return (
                f"its {type(norm).__name__} spans {len(norm.normalized_shape)} dimensions; only the last can be fused"
            )
    if isinstance(parts, FFNParts) and gelu_variant(parts.act) is None:
        return f"its activation is {type(parts.act).__name__}; only GELU (erf, tanh or quick) can be fused"
    if isinstance(parts, GatedFFNParts) and gate_variant(parts.act) is None:
        return f"its gate is {type(parts.act).__name__}; only SiLU and GELU (erf, tanh or quick) can be fused"
    if isinstance(parts, AttentionParts) and (reason := _reason_against_qk_norm(parts)) is not None:
        return reason
    dim, dim_out = linears[0], linears[-1]
    if dim.in_features != dim_out.out_features and (parts.residual or not isinstance(parts, AttentionParts)):
        return f"it turns {dim.in_features} channels into {dim_out.out_features}; the fused form keeps them"
    return None


def _reason_against_qk_norm(parts: AttentionParts) -> str | None:
    q_norm, k_norm = parts.q_norm, parts.k_norm
    if type(q_norm) is type(k_norm) is nn.Identity:
        return None
    if type(q_norm) is not type(k_norm) or not isinstance(q_norm, NORMS) or q_norm.eps != k_norm.eps:
        names = f"{type(q_norm).__name__} and {type(k_norm).__name__}"
        return f"its QK-norm is {names}; only LayerNorm or RMSNorm, the same for both, can be fused"
    if tuple(q_norm.normalized_shape) != (parts.d_qk,):
        return f"its QK-norm spans {list(q_norm.normalized_shape)} channels; only those of one head can be fused"
    return None


NORMS = (nn.LayerNorm, nn.RMSNorm)  # whose cores stay, inside the operators


def _linears(parts: AttentionParts | AnyFFNParts) -> tuple[Any, ...]:
    """The projections in order."""
    if isinstance(parts, FFNParts):
        return parts.fc1, parts.fc2
    if isinstance(parts, GatedFFNParts):
        return parts.gate, parts.up, parts.out
    return *_projections(parts), parts.proj


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


def rms_norm(norm: Any, eps: float) -> nn.RMSNorm:
    """An ``nn.RMSNorm`` on the weight of another library's own."""
    made = nn.RMSNorm(norm.weight.shape, eps, elementwise_affine=False)
    made.weight = norm.weight
    return made


def repeated_heads(shared: nn.Module, times: int, width: int) -> nn.Module:
    """A projection whose heads are ``width`` wide as one with each of them that often: K or V that heads share."""
    if type(shared) is not nn.Linear or times == 1:
        return shared

    def repeated(t: Tensor) -> Tensor:
        return t.unflatten(0, (-1, width)).repeat_interleave(times, dim=0).flatten(0, 1)

    return linear(repeated(shared.weight), None if shared.bias is None else repeated(shared.bias))


def halves_of(packed: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two projections that one Linear holds, one above the other; itself twice where it is no plain Linear."""
    if type(packed) is not nn.Linear:
        return packed, packed
    biases = (None, None) if packed.bias is None else packed.bias.chunk(2)
    first, second = (linear(w, b) for w, b in zip(packed.weight.chunk(2), biases, strict=True))
    return first, second


def _projections(parts: AttentionParts) -> tuple[nn.Module, ...]:
    return parts.qkv if isinstance(parts.qkv, tuple) else (parts.qkv,)


def gelu_variant(act: nn.Module) -> str | None:
    """The form of a GELU as ``approximate`` names it; None for any other activation, subclasses included."""
    if type(act) is QuickGELU:
        return "quick"
    return act.approximate if type(act) is nn.GELU else None


def gate_variant(act: nn.Module) -> str | None:
    """The gate as ``activation`` names it; None for any other."""
    if type(act) is nn.SiLU:
        return "silu"
    form = gelu_variant(act)
    return None if form is None else {"none": "gelu"}.get(form, f"gelu_{form}")


# --- parts → fused module ---------------------------------------------------------------------------------------------


def fold_attention(parts: AttentionParts, backend: Backend) -> RepAttention | BiasedAttention:
    """Every fold of the attention algebra; the LayerNorm core and the shortcut stay, inside the operator."""
    affine, norm = _norm_fold(parts.norm)
    weights = _folded(_weights_of(parts), affine, parts)
    _, qk_norm = _norm_fold(parts.q_norm)
    _, inner_norm = _norm_fold(parts.inner_norm)
    fused = RepAttention(
        weights.w_qkv.shape[1],
        weights.num_heads,
        d_qk=weights.d_qk,
        d_v=weights.d_v,
        dim_out=weights.w_proj.shape[0],
        scale=weights.scale,
        **norm,
        residual=parts.residual,
        **{name.replace("norm", "qk_norm"): value for name, value in qk_norm.items()},
        rotary_layout=parts.rotary_layout or "half",
        inner_norm_eps=inner_norm.get("norm_eps"),
        backend=backend,
        device="meta",
    )
    dtype = _dtype_of(parts.proj)
    fused = _filled(fused, weights, dtype)
    if qk_norm:
        fused.q_norm, fused.k_norm = (nn.Parameter(_head_affine(n, dtype)) for n in (parts.q_norm, parts.k_norm))
    if not parts.takes_bias:
        return fused
    return BiasedAttention(fused, None if parts.bias is None else reparam.cast(parts.bias.detach(), dtype, "bias"))


def fold_window_attention(parts: WindowParts, backend: Backend) -> WindowRepAttention:
    """As :func:`fold_attention`; padded tokens keep the K and V they had before the norm's affine was folded."""
    affine, norm = _norm_fold(parts.attention.norm)
    original = _weights_of(parts.attention)
    weights = _folded(original, affine, parts.attention)
    fused = WindowRepAttention(
        weights.w_qkv.shape[1],
        weights.num_heads,
        parts.window,
        parts.shift,
        d_qk=weights.d_qk,
        d_v=weights.d_v,
        scale=weights.scale,
        **norm,
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


def fold_ffn(parts: AnyFFNParts, backend: Backend) -> PartialGELUFFN | GatedFFN:
    """A vanilla FFN is a channel-idle one with every channel active."""
    if isinstance(parts, GatedFFNParts):
        return _fold_gated_ffn(parts, backend)
    affine, norm = _norm_fold(parts.norm)
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
        **norm,
        approximate=gelu_variant(parts.act) or "none",
        backend=backend,
    )


def _fold_gated_ffn(parts: GatedFFNParts, backend: Backend) -> GatedFFN:
    affine, norm = _norm_fold(parts.norm)
    inner, inner_norm = _norm_fold(parts.inner_norm)
    gate, up, out = _linears(parts)
    merged = reparam.merge_gated_ffn(
        gate.weight,
        gate.bias,
        up.weight,
        up.bias,
        out.weight,
        out.bias,
        input_affine=affine,
        inner_affine=inner,
        output_scale=parts.output_scale,
        shortcut=parts.residual,
    )
    return GatedFFN.from_merged(
        merged,
        dtype=out.weight.dtype,
        activation=gate_variant(parts.act) or "silu",
        **norm,
        inner_norm_eps=inner_norm.get("norm_eps"),
        backend=backend,
    )


def _norm_fold(norm: nn.Module) -> tuple[Affine | None, dict[str, Any]]:
    """The affine that folds into the next matrix (None: none), and arguments for the core that stays (none: no norm).

    An ``nn.RMSNorm`` without an eps takes the spacing of the numbers that it computes in: float32 unless it is float64.
    """
    if isinstance(norm, nn.RMSNorm):
        if (eps := norm.eps) is None:
            double = norm.weight is not None and norm.weight.dtype == torch.float64
            eps = torch.finfo(torch.float64 if double else torch.float32).eps
        affine = None if norm.weight is None else reparam.layernorm_affine(norm.weight, None)
        return affine, {"norm_eps": eps, "norm": "rms"}
    if not isinstance(norm, nn.LayerNorm):
        return None, {}
    if norm.weight is None:
        return None, {"norm_eps": norm.eps}
    return reparam.layernorm_affine(norm.weight, norm.bias), {"norm_eps": norm.eps}


def _weights_of(parts: AttentionParts) -> AttentionWeights:
    proj: Any = parts.proj
    qkv: list[Any] = list(_projections(parts))
    weight = torch.cat([part.weight for part in qkv])
    biases = [part.weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in qkv]
    bias = None if all(part.bias is None for part in qkv) else torch.cat(biases)
    return reparam.attention_weights(weight, bias, proj.weight, proj.bias, parts.num_heads, parts.d_qk, parts.scale)


def _folded(weights: AttentionWeights, affine: Affine | None, parts: AttentionParts) -> AttentionWeights:
    """All attention folds that are exact, in the one order in which they are.

    Behind a rotation the K bias is another number for every key, and no scale passes a norm: there both stay. So does
    the V bias in front of an inner norm.
    """
    if affine is not None:
        weights = reparam.fold_input_affine(weights, affine)
    if not parts.turns:
        weights = reparam.drop_k_bias(weights)
    inner, inner_norm = _norm_fold(parts.inner_norm)
    if inner is not None:
        weights = reparam.fold_inner_affine(weights, inner)
    if not parts.keep_v_bias and not inner_norm:
        weights = reparam.move_v_bias(weights)
    if type(parts.q_norm) is nn.Identity:
        weights = reparam.fold_scale(weights)
    if parts.output_scale is None:
        return weights
    return reparam.fold_attention_output_scale(weights, parts.output_scale)


def _head_affine(norm: Any, dtype: torch.dtype) -> Tensor:
    """Weight and bias of a norm over a head, [2, d_qk]."""
    affine = reparam.layernorm_affine(norm.weight, getattr(norm, "bias", None), norm.normalized_shape[0])
    stacked: Tensor = reparam.cast(torch.stack(affine), dtype, "weight and bias of QK-norm")
    return stacked


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
