"""One sub-block in, one fused module out: which folds each kind of sub-block takes, and why one cannot be fused.

A rule maps a module class to (can_fuse, fold). ``can_fuse`` returns None or the reason in one line; ``fold`` returns
the fused module, equal to the original in evaluation. New families register a rule here; nothing else knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import reparam
from .backends import Backend
from .models.swin import SwinBlock
from .nn import FFN, Attention, Block, PartialGELUFFN, RepAttention, RepBN, WindowAttention, WindowRepAttention
from .nn.channel_idle_ffn import affine_of
from .nn.packed_weights import PackedWeights
from .reparam import Affine, AttentionWeights


@dataclass(frozen=True)
class Rule:
    """How one class of sub-block is fused. ``can_fuse`` gives None or a reason; ``fold`` gives the fused module."""

    kind: str
    can_fuse: Callable[[nn.Module], str | None]
    fold: Callable[[nn.Module, Backend], nn.Module]


def _reason(*linears: nn.Module, norm: nn.Module, act: nn.Module | None = None) -> str | None:
    """Why a sub-block of these parts cannot be folded: parts that are not what they were built as, or None."""
    for part in linears:
        if type(part) is not nn.Linear:
            return f"a projection is {type(part).__name__}, wanted nn.Linear (merge adapters or dequantise first)"
    if type(norm) not in (nn.Identity, nn.LayerNorm):
        return f"its norm {type(norm).__name__} has no fold (LayerNorm has; BatchNorm folds in reparameterize)"
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
        return f"its LayerNorm spans {len(norm.normalized_shape)} dimensions; only the last can be fused"
    if act is not None and type(act) is not nn.GELU:
        return f"its activation is {type(act).__name__}; only GELU (erf or tanh) can be fused"
    return None


def _norm_fold(norm: nn.Module) -> tuple[Affine | None, float | None]:
    """The affine that folds into the next matrix (None: none), and the eps of the core that stays (None: no norm)."""
    if isinstance(norm, nn.Identity):
        return None, None
    if norm.weight is None:
        return None, norm.eps
    return reparam.layernorm_affine(norm.weight, norm.bias), norm.eps


def _folded_attention(
    weights: AttentionWeights, affine: Affine | None, output_scale: Tensor | None = None
) -> AttentionWeights:
    """All attention folds, in the one order that is exact."""
    if affine is not None:
        weights = reparam.fold_input_affine(weights, affine)
    weights = reparam.fold_scale(reparam.move_v_bias(reparam.drop_k_bias(weights)))
    return weights if output_scale is None else reparam.fold_attention_output_scale(weights, output_scale)


def _fill(module: RepAttention, weights: AttentionWeights, dtype: torch.dtype) -> None:
    for name in ("w_qkv", "b_qkv", "w_proj", "b_proj"):
        setattr(module, name, nn.Parameter(reparam.cast(getattr(weights, name), dtype, name)))


def _weights_of(module: Attention | WindowAttention) -> AttentionWeights:
    return reparam.attention_weights(
        module.qkv.weight,
        module.qkv.bias,
        module.proj.weight,
        module.proj.bias,
        module.num_heads,
        module.d_qk,
        module.scale,
    )


# --- Attention → RepAttention ---------------------------------------------------------------------------------------


def _fold_attention(module: Attention, backend: Backend) -> RepAttention:
    affine, norm_eps = _norm_fold(module.norm)
    weights = _folded_attention(_weights_of(module), affine, module.output_scale())
    fused = RepAttention(
        module.dim,
        module.num_heads,
        d_qk=module.d_qk,
        d_v=module.d_v,
        scale=weights.scale,
        norm_eps=norm_eps,
        residual=module.residual,
        backend=backend,
        device="meta",
    )
    _fill(fused, weights, module.qkv.weight.dtype)
    return fused


# --- FFN → PartialGELUFFN with every channel active -----------------------------------------------------------------


def _fold_ffn(module: FFN, backend: Backend) -> PartialGELUFFN:
    affine, norm_eps = _norm_fold(module.norm)
    merged = reparam.merge_channel_idle_ffn(
        module.fc1.weight,
        module.fc1.bias,
        module.fc2.weight,
        module.fc2.bias,
        module.fc1.out_features,
        input_affine=affine,
        output_scale=module.output_scale(),
        shortcut=module.residual,
    )
    return PartialGELUFFN.from_merged(
        merged,
        dtype=module.fc1.weight.dtype,
        norm_eps=norm_eps,
        approximate=module.act.approximate,
        backend=backend,
    )


# --- SwinBlock → Block(WindowRepAttention, its mlp) -----------------------------------------------------------------


def _fold_swin_block(block: SwinBlock, backend: Backend) -> Block:
    attn = block.attn
    affine, norm_eps = _norm_fold(block.norm1)
    original = _weights_of(attn)
    weights = _folded_attention(original, affine, block.output_scale())
    fused = WindowRepAttention(
        attn.dim,
        attn.num_heads,
        attn.window,
        attn.shift,
        scale=weights.scale,
        norm_eps=norm_eps,
        residual=True,
        padding=affine is not None,
        backend=backend,
        device="meta",
    )
    dtype = attn.qkv.weight.dtype
    _fill(fused, weights, dtype)
    if affine is not None:
        fused.pad_kv = nn.Parameter(reparam.cast(reparam.pad_kv_vector(original, affine, weights), dtype, "pad_kv"))
    fused.rel_bias = nn.Parameter(reparam.cast(attn.rel_bias(), dtype, "rel_bias"))
    return Block(fused, block.mlp)


# --- deployed modules: already in shape, only the backend is set ----------------------------------------------------


def _set_backend(module: PackedWeights, backend: Backend) -> nn.Module:
    if backend == "reference":
        module.restore_unpacked()
    module.backend = backend
    return module


def _always(_: nn.Module) -> None:
    return None


RULES: dict[type[nn.Module], Rule] = {
    Attention: Rule("rep_attention", lambda m: _reason(m.qkv, m.proj, norm=m.norm), _fold_attention),
    FFN: Rule("partial_gelu_ffn", lambda m: _reason(m.fc1, m.fc2, norm=m.norm, act=m.act), _fold_ffn),
    SwinBlock: Rule("window_rep_attention", lambda m: _reason(m.attn.qkv, m.attn.proj, norm=m.norm1), _fold_swin_block),
    PartialGELUFFN: Rule("partial_gelu_ffn", _always, _set_backend),
    RepAttention: Rule("rep_attention", _always, _set_backend),
    WindowRepAttention: Rule("window_rep_attention", _always, _set_backend),
}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module of exactly this class; None for modules that are no sub-block of a known family."""
    return RULES.get(type(module))


def can_fuse(module: nn.Module) -> str | None:
    """None if :func:`repavit_ops.fuse` can fuse this sub-block, else the reason in one line."""
    rule = rule_of(module)
    if rule is None:
        return f"{type(module).__name__} is no sub-block that repavit_ops knows"
    if rule.fold is not _set_backend and any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return "it has forward hooks, which a fused module would not call; remove them first"
    return rule.can_fuse(module)


def fold_batchnorm(module: Attention) -> Attention:
    """Attention without its BatchNorm (or SLAB's RepBN): both fold wholly into qkv.

    Raises:
        ValueError: a folded weight is not finite; names it and what to check.
    """
    norm = module.norm
    affine = affine_of(norm)
    if isinstance(norm, RepBN):
        affine = reparam.repbn_affine(affine, norm.alpha)
    weights = reparam.fold_input_affine(_weights_of(module), affine)
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
    return merged.train(module.training)
