"""Rules for the modules of timm's ViT-like families, by the identity of classes that are loaded already.

A pre-norm block is closed: its halves become ``x + scale · body(norm(x))``, each fused alone if its body has a rule.
Bodies in any other surroundings (post-norm blocks, MLP-Mixers, pooling heads, …) are fused without norm and shortcut.
A module that holds anything its rule does not know (a child, a parameter, an attribute) is skipped and named.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from .backends import Backend
from .folding import AttentionParts, FFNParts, WindowParts, fold_attention, fold_ffn, fold_window_attention
from .folding import reason_against as reason_against_parts
from .nn.foreign_block import (
    ChannelScale,
    FixedWindowBlock,
    ForwardingBlock,
    MaskedAttention,
    MaskedBlock,
    OpenBranch,
)
from .nn.packed_weights import PackedWeights
from .rules import Rule, can_fuse

Parts = AttentionParts | FFNParts


@dataclass(frozen=True)
class Body:
    """A branch without norm and shortcut: its operator, what is odd about a module (None: nothing), its parts."""

    kind: str
    oddity: Callable[[Any], str | None]
    parts: Callable[..., Parts]  # (module, norm, output_scale, residual)


# --- classes of the loaded timm ---------------------------------------------------------------------------------------


def loaded(*paths: str) -> set[type]:
    """The classes of these dotted names that exist; older versions of timm lack some."""
    found = (getattr(sys.modules.get(path.rpartition(".")[0]), path.rpartition(".")[2], None) for path in paths)
    return {cls for cls in found if isinstance(cls, type)}


@cache
def rules() -> dict[type[nn.Module], Rule]:
    """Every rule for the loaded timm, by class."""
    found: dict[type[nn.Module], Rule] = {OpenBranch: Rule("branch", _branch_reason, _fold_branch)}
    for cls, body in bodies().items():
        found[cls] = Rule(body.kind, partial(_body_reason, body), partial(_fold_body, body))
    for path, close in BLOCKS.items():
        for cls in loaded(path):
            found[cls] = Rule("block", partial(_block_reason, close), partial(_fold_block, close), keeps_children=True)
    for cls in loaded("timm.models.swin_transformer.SwinTransformerBlock"):
        found[cls] = Rule("window_rep_attention", _swin_reason, _fold_swin)
    for path, reason in UNSUPPORTED.items():
        for cls in loaded(path):
            found[cls] = _refusing(reason)
    return found


def rule_for(cls: type[nn.Module]) -> Rule | None:
    """The rule for a class; attention and FFN classes of timm that nothing is known about get one that refuses."""
    if (rule := rules().get(cls)) is not None:
        return rule
    looks_like_one = cls.__module__.startswith("timm.") and re.search(r"Attention|Attn|Mlp$|FFN$", cls.__name__)
    if looks_like_one and cls not in loaded("timm.models.swin_transformer.WindowAttention"):  # the block's rule has it
        return _refusing("repavit_ops has no operator for what it computes")
    return None


@cache
def bodies() -> dict[type[nn.Module], Body]:
    attention = Body("rep_attention", _attention_oddity, _attention_parts)
    ffn = Body("partial_gelu_ffn", _mlp_oddity, _mlp_parts)
    return {
        # up to some 1.0.x the class is vision_transformer's own, later it is timm.layers'
        **dict.fromkeys(loaded("timm.models.vision_transformer.Attention"), attention),
        **dict.fromkeys(loaded("timm.layers.Mlp"), ffn),
    }


UNSUPPORTED = {
    "timm.layers.AttentionRope": "rotary position embeddings turn q and k in between",
    "timm.models.eva.EvaAttention": "rotary position embeddings turn q and k in between",
    "timm.layers.DiffAttention": "differential attention subtracts a second softmax",
    "timm.layers.AttentionPoolLatent": "attention pooling: its queries are not the tokens",
    "timm.layers.AttentionPoolPrr": "attention pooling: its queries are not the tokens",
    "timm.layers.GluMlp": "a gated FFN multiplies two projections; only fc1 → GELU → fc2 can be fused",
    "timm.layers.SwiGLU": "a gated FFN multiplies two projections; only fc1 → GELU → fc2 can be fused",
    "timm.layers.GatedMlp": "a gated FFN multiplies two projections; only fc1 → GELU → fc2 can be fused",
    "timm.layers.GlobalResponseNormMlp": "a norm over all tokens stands between activation and fc2",
    "timm.layers.ConvMlp": "its layers are convolutions; only nn.Linear can be fused",
    "timm.models.beit.Attention": "relative position biases of its own and its caller's are added to the scores",
    "timm.models.vision_transformer_relpos.RelPosAttention": "relative position biases are added to the scores",
    "timm.models.vision_transformer_sam.Attention": "relative position biases depend on q",
    "timm.models.swin_transformer_v2.WindowAttention": "cosine attention normalises q and k in between",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": "cosine attention normalises q and k in between",
    "timm.models.vision_transformer.ParallelScalingBlock": "attention and FFN run in parallel on one projection",
    "timm.models.vision_transformer.DiffParallelScalingBlock": "attention and FFN run in parallel on one projection",
}


def _refusing(reason: str) -> Rule:
    def fold(module: nn.Module, backend: Backend) -> nn.Module:
        raise TypeError(f"{type(module).__name__} cannot be fused: {reason}")

    return Rule("unsupported", lambda _: reason, fold)


# --- what a module holds beside what its rule knows -------------------------------------------------------------------

BUILT_IN = frozenset(vars(nn.Module())) | {"forward"}  # one on the instance is refused elsewhere


def surprise(module: nn.Module, required: Iterable[str], optional: Iterable[str] = ()) -> str | None:
    """Names that are missing, or that there is no knowing about; private ones and None do not count."""
    required = set(required)
    names = {*module._modules, *module._parameters, *module._buffers, *(vars(module).keys() - BUILT_IN)}
    if missing := sorted(required - names):
        return f"{type(module).__name__} lacks {', '.join(missing)}; this version of timm is not known"
    extra = sorted(n for n in names - required - set(optional) if n[0] != "_" and getattr(module, n) is not None)
    if extra:
        return f"{type(module).__name__} also holds {', '.join(extra)}, which its rule does not know"
    return None


def _absent(module: nn.Module, name: str) -> bool:
    """Whether an optional child is not there: missing in older versions, None, or the identity."""
    child = getattr(module, name, None)
    return child is None or type(child) is nn.Identity


# --- bodies -----------------------------------------------------------------------------------------------------------


def _attention_oddity(attn: Any) -> str | None:
    children = ("qkv", "proj", "attn_drop", "proj_drop", "num_heads", "head_dim", "scale", "fused_attn")
    between = {
        "q_norm": "QK-norm normalises q and k in between",
        "k_norm": "QK-norm normalises q and k in between",
        "norm": "a norm stands between attention and its projection",
        "gate": "a gate multiplies the attention output",
    }
    if (reason := surprise(attn, children, (*between, "attn_dim"))) is not None:
        return reason
    return next((reason for name, reason in between.items() if not _absent(attn, name)), None)


def _attention_parts(attn: Any, norm: nn.Module, output_scale: Tensor | None, residual: bool) -> AttentionParts:
    scale = attn.head_dim**-0.5 if attn.fused_attn else attn.scale  # what its forward takes
    return AttentionParts(
        norm, attn.qkv, attn.proj, attn.num_heads, attn.head_dim, scale, output_scale, residual, keep_v_bias=True
    )


def _mlp_oddity(mlp: Any) -> str | None:
    if (reason := surprise(mlp, ("fc1", "act", "drop1", "fc2", "drop2"), ("norm",))) is not None:
        return reason
    return None if _absent(mlp, "norm") else "a norm stands between activation and fc2"


def _mlp_parts(mlp: Any, norm: nn.Module, output_scale: Tensor | None, residual: bool) -> FFNParts:
    return FFNParts(norm, mlp.fc1, mlp.fc2, _plain_act(mlp.act), output_scale, residual)


def _body_reason(body: Body, module: nn.Module) -> str | None:
    return body.oddity(module) or reason_against_parts(body.parts(module, nn.Identity(), None, False))


def _fold_body(body: Body, module: nn.Module, backend: Backend) -> nn.Module:
    parts = body.parts(module, nn.Identity(), None, False)
    return fold_ffn(parts, backend) if isinstance(parts, FFNParts) else MaskedAttention(fold_attention(parts, backend))


def _plain_act(act: nn.Module) -> nn.Module:
    """timm's GELU classes as PyTorch's; any other as it is."""
    if type(act) in loaded("timm.layers.activations.GELU"):
        return nn.GELU()
    if type(act) in loaded("timm.layers.activations.GELUTanh"):
        return nn.GELU("tanh")
    return act


def _plain_norm(norm: Any) -> nn.Module:
    """timm's LayerNorm classes as PyTorch's, sharing the affine; any other as it is."""
    if type(norm) not in loaded("timm.layers.LayerNorm", "timm.layers.LayerNormFp32"):
        return norm
    plain = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    plain.weight, plain.bias = norm.weight, norm.bias
    return plain


# --- one half of a block ----------------------------------------------------------------------------------------------


def _branch_reason(branch: OpenBranch) -> str | None:
    if isinstance(branch.body, MaskedAttention | PackedWeights):
        return f"only its body is fused, without norm ({type(branch.norm).__name__}) and shortcut"
    body = bodies().get(type(branch.body))
    if body is None:
        return can_fuse(branch.body)
    known = loaded("timm.layers.LayerScale", "timm.models.vision_transformer.LayerScale", "timm.layers.DropPath")
    for after in branch.after:
        if type(after) not in {nn.Identity, ChannelScale, *known}:
            return f"{type(after).__name__} stands between the branch and its shortcut"
    return body.oddity(branch.body) or reason_against_parts(_branch_parts(body, branch))


def _branch_parts(body: Body, branch: OpenBranch) -> Parts:
    gammas = [after.gamma for after in branch.after if hasattr(after, "gamma")]
    return body.parts(branch.body, _plain_norm(branch.norm), gammas[0] if gammas else None, True)


def _fold_branch(branch: OpenBranch, backend: Backend) -> nn.Module:
    parts = _branch_parts(bodies()[type(branch.body)], branch)
    return fold_ffn(parts, backend) if isinstance(parts, FFNParts) else fold_attention(parts, backend)


# --- blocks -----------------------------------------------------------------------------------------------------------


def _close_vit(block: Any) -> MaskedBlock | str:
    """``x + drop_path1(ls1(attn(norm1(x))))``, then the same of mlp: ViT, DeiT, CLIP, SigLIP, DINOv2, PiT, CrossViT."""
    names = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    return surprise(block, names) or MaskedBlock(
        OpenBranch(block.norm1, block.attn, block.ls1, block.drop_path1),
        OpenBranch(block.norm2, block.mlp, block.ls2, block.drop_path2),
    )


def _close_relpos(block: Any) -> ForwardingBlock | str:
    """As :func:`_close_vit`, but what comes beside x belongs to attention."""
    closed = _close_vit(block)
    return closed if isinstance(closed, str) else ForwardingBlock(closed.attn, closed.mlp)


def _close_gamma(block: Any) -> ForwardingBlock | str:
    """LayerScale vectors gamma_1, gamma_2 as parameters of the block, or None: EVA, DINOv3, BEiT."""
    names = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "gamma_1", "gamma_2")
    if (reason := surprise(block, names, ("init_values",))) is not None:
        return reason
    first, second = ([] if gamma is None else [ChannelScale(gamma)] for gamma in (block.gamma_1, block.gamma_2))
    return ForwardingBlock(
        OpenBranch(block.norm1, block.attn, *first, block.drop_path1),
        OpenBranch(block.norm2, block.mlp, *second, block.drop_path2),
    )


BLOCKS: dict[str, Callable[[Any], MaskedBlock | ForwardingBlock | str]] = {
    "timm.models.vision_transformer.Block": _close_vit,
    "timm.models.vision_transformer_relpos.RelPosBlock": _close_relpos,
    "timm.models.eva.EvaBlock": _close_gamma,
    "timm.models.beit.Block": _close_gamma,
}


def _block_reason(close: Callable[[Any], nn.Module | str], block: nn.Module) -> str | None:
    """None if one half or both can be fused with norm and shortcut."""
    closed = close(block)
    if isinstance(closed, str):
        return closed
    reasons = {name: can_fuse(half) for name, half in closed.named_children()}
    return None if None in reasons.values() else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _fold_block(close: Callable[[Any], nn.Module | str], block: nn.Module, backend: Backend) -> nn.Module:
    closed = close(block)
    assert isinstance(closed, nn.Module)
    return closed  # the halves are fused on their own, by the rule for OpenBranch


# --- Swin -------------------------------------------------------------------------------------------------------------


def _swin_reason(block: Any) -> str | None:
    block_names = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "window_size", "shift_size")
    settled = ("dim", "input_resolution", "target_shift_size", "always_partition", "dynamic_mask", "window_area")
    attn_names = ("qkv", "proj", "attn_drop", "proj_drop", "softmax", "relative_position_bias_table", "num_heads")
    attn_settled = ("relative_position_index", "scale", "dim", "window_size", "window_area", "fused_attn")
    attn: Any = block.attn
    if type(attn) not in loaded("timm.models.swin_transformer.WindowAttention"):
        return f"its attention is {type(attn).__name__}, wanted timm's Swin WindowAttention"
    return (
        surprise(block, block_names, (*settled, "mlp_ratio", "attn_mask"))
        or surprise(attn, (*attn_names, *attn_settled))
        or reason_against_parts(_swin_parts(block))
    )


def _swin_parts(block: Any) -> WindowParts:
    attn = block.attn
    d_qk = attn.proj.in_features // attn.num_heads if type(attn.proj) is nn.Linear else 0
    scale = d_qk**-0.5 if attn.fused_attn and d_qk else attn.scale
    attention = AttentionParts(_plain_norm(block.norm1), attn.qkv, attn.proj, attn.num_heads, d_qk, scale)
    return WindowParts(
        attention,
        attn._get_rel_pos_bias()[0].detach(),
        tuple(attn.window_size),
        tuple(block.shift_size),
        roll_first=True,
        static_shift=True,
    )


def _fold_swin(block: Any, backend: Backend) -> nn.Module:
    return FixedWindowBlock(
        fold_window_attention(_swin_parts(block), backend), OpenBranch(block.norm2, block.mlp, block.drop_path2)
    )
