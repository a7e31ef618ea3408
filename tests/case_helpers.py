"""Small accepted arguments of every operator, the ways to call it with them, and how a refusal is looked at."""

from __future__ import annotations

import pytest
import torch
from op_helpers import cast
from test_gated_ffn import operands as gated_operands
from test_partial_gelu_ffn import operands as ffn_operands
from test_patch_projection import operands as patch_operands
from test_rep_attention import op as attention
from test_rep_attention import operands as attention_operands
from test_window_rep_attention import op as windows
from test_window_rep_attention import operands as window_operands

from repavit_ops import backends, ops
from repavit_ops.stack_plan import Step

OP = torch.ops.repavit_ops
REASON = backends.why_unavailable("cpp")

HEADS, D_QK, D_V = 2, 3, 4
NAMES = {
    "partial_gelu_ffn": ("x", "w_in", "b_in", "w_out", "w_merged", "bias", "packed"),
    "gated_ffn": ("x", "w_gate", "b_gate", "w_up", "b_up", "w_out", "w_merged", "bias", "packed"),
    "rep_attention": (
        *("x", "w_qkv", "b_qkv", "w_proj", "b_proj", "attn_bias", "rotary_cos", "rotary_sin", "q_norm", "k_norm"),
        "packed",
    ),
    "window_rep_attention": ("x", "w_qkv", "b_qkv", "w_proj", "b_proj", "rel_bias", "pad_kv", "packed"),
    "patch_projection": ("x", "weight", "bias", "packed"),
}
OPERATORS = tuple(NAMES)


def case(name):
    """Tensors of the schema, packed weights behind them, and keyword arguments; small and in float32."""
    if name == "partial_gelu_ffn":
        tensors = cast(ffn_operands(3, 8, 5), torch.float32)
        return [*tensors, OP.partial_gelu_ffn_pack(tensors[1], tensors[3], tensors[4])], {}
    if name == "rep_attention":
        tensors, static = attention_operands(2, 5, 8, HEADS, D_QK, D_V)
        turned = (torch.ones(4, 2), torch.zeros(4, 2), torch.ones(2, D_QK), torch.ones(2, D_QK))
        tensors = cast((*tensors, torch.zeros(5, 5), *turned), torch.float32)
        packed = OP.rep_attention_pack(tensors[1], tensors[3], num_heads=HEADS, d_qk=D_QK)
        return [*tensors, packed], {**static, "qk_norm_eps": 1e-5}
    if name == "gated_ffn":
        tensors = cast(gated_operands(3, 8, 5), torch.float32)
        return [*tensors, OP.gated_ffn_pack(tensors[1], tensors[3], tensors[5], tensors[6])], {"activation": "silu"}
    if name == "window_rep_attention":
        tensors, static = window_operands(2, 5, 6, 8, HEADS, D_V, [4, 4], [2, 2])
        tensors = cast(tensors, torch.float32)
        return [*tensors, OP.rep_attention_pack(tensors[1], tensors[3], num_heads=HEADS, d_qk=D_V)], static
    tensors = cast(patch_operands(2, 3, 8, 12, (4, 4), 5, False), torch.float32)
    return [*tensors, OP.patch_projection_pack(tensors[1])], {"patch": [4, 4], "channels_last": False}


def registered(name, tensors, static):
    return getattr(OP, name)(*tensors, **static)


def public(name, tensors, static):
    """The function of ``repavit_ops.ops``, or for ``fused_blocks`` of one step."""
    *operands, packed = tensors
    if name == "rep_attention":
        return attention(*operands, packed=packed, **static)
    if name == "window_rep_attention":
        return windows(*operands, packed=packed, **static)
    return getattr(ops, name)(*operands, packed=packed, **static)


def one_step(name, tensors, static):
    """The same operator as a step of fused_blocks."""
    defaults = {"norm_eps": None, "residual": False, "approximate": "none", "roll_first": False}
    x, *operands, packed = tensors
    step = Step(name, tuple(operands), {**defaults, **static}, packed)
    return ops.fused_blocks(x, [step])


WAYS = {"registered": registered, "public": public, "one_step": one_step}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_operator = pytest.mark.parametrize("name", OPERATORS)


def refused(names, call, *args, **kwargs):
    """The call raises ValueError or RuntimeError, and the message holds one of ``names``."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert any(name in message for name in ([names] if isinstance(names, str) else names)), message
