"""The rule for one half of a foreign block: ``x + after(body(norm(x)))`` is fused as one operator if its parts fold."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..backends import Backend
from ..nn.foreign_block import BiasedAttention, ChannelScale, MaskedAttention, OpenBranch
from ..nn.packed_weights import PackedWeights
from .folding import AnyFFNParts, AttentionParts, fold_attention, fold_ffn, reason_against
from .rules import Rule, can_fuse, plain, rule_of


def _reason(branch: OpenBranch) -> str | None:
    if isinstance(branch.body, MaskedAttention | BiasedAttention | PackedWeights):
        return f"only its body is fused, without norm ({type(branch.norm).__name__}) and shortcut"
    rule = rule_of(branch.body)
    if rule is None or rule.parts is None:
        return can_fuse(branch.body)
    for after in branch.after:
        if type(plain(after)) not in (nn.Identity, ChannelScale):
            return f"{type(after).__name__} stands between the branch and its shortcut"
    return rule.can_fuse(branch.body) or reason_against(_parts(branch))


def _parts(branch: OpenBranch) -> AttentionParts | AnyFFNParts:
    rule = rule_of(branch.body)
    assert rule is not None
    assert rule.parts is not None
    scales = [scale.gamma for after in branch.after if isinstance(scale := plain(after), ChannelScale)]
    found: AttentionParts | AnyFFNParts = rule.parts(branch.body)
    return replace(found, norm=plain(branch.norm), output_scale=scales[0] if scales else None, residual=True)


def _fold(branch: OpenBranch, backend: Backend) -> nn.Module:
    parts = _parts(branch)
    return fold_attention(parts, backend) if isinstance(parts, AttentionParts) else fold_ffn(parts, backend)


HALF = Rule("branch", _reason, _fold)
