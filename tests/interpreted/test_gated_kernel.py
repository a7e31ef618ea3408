"""The gated FFN's kernel, RMSNorm, and the rows of queries and keys between projection and attention."""

from __future__ import annotations

import pytest
import torch
from op_helpers import assert_follows_rule, cast, check_operator, randn
from test_gated_ffn import operands as gated_operands
from test_partial_gelu_ffn import operands as ffn_operands
from test_rotary_attention import operands as turned_operands
from test_rotary_attention import static_of

from repavit_ops import reference
from repavit_ops.kernels import gated_ffn as gated
from repavit_ops.kernels.partial_gelu_ffn import partial_gelu_ffn
from repavit_ops.kernels.rep_attention import rep_attention
from repavit_ops.kernels.tuning import Config

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
TILES = {
    "plain": Config(16, 16, 16, 1, 1, split=False),
    "descriptors": Config(16, 32, 16, 1, 1, tma=True),
    "persistent": Config(16, 32, 16, 1, 1, persistent=1),
}


@pytest.mark.parametrize("shape", [(19, 37, 23), (16, 32, 32), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_first_launch(tile, shape):
    x, w_gate, b_gate, w_up, b_up, *_ = cast(gated_operands(*shape), torch.float32)

    def formula(x, w_gate, b_gate, w_up, b_up):
        return torch.nn.functional.silu(x @ w_gate.t() + b_gate) * (x @ w_up.t() + b_up)

    tensors = (x, w_gate, b_gate, w_up, b_up)
    ours = gated.gated(*tensors, "silu", config=TILES[tile])
    assert_follows_rule(ours, formula(*tensors), formula(*cast(tensors, torch.float64)))


@FLOATS
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("activation", ["silu", "gelu_quick"])
def test_operator(activation, merged, dtype):
    tensors = tuple(None if i == 6 and not merged else t for i, t in enumerate(gated_operands(19, 37, 23)))
    static = {"activation": activation, "norm_eps": 1e-6, "norm": "rms" if merged else "layer", "residual": True}
    static["inner_norm_eps"] = None if merged else 1e-5
    check_operator(gated.gated_ffn, reference.gated_ffn, tensors, dtype, **static)


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 0, 4), (3, 8, 0)], ids=str)
def test_empty_sizes(shape):
    check_operator(gated.gated_ffn, reference.gated_ffn, gated_operands(*shape), torch.float32, activation="silu")


@FLOATS
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_rms_norm_in_front_of_the_plain_ffn(merged, dtype):
    tensors = tuple(None if i == 4 and not merged else t for i, t in enumerate(ffn_operands(19, 37, 23)))
    static = {"norm_eps": 1e-6, "norm": "rms", "residual": True}
    check_operator(partial_gelu_ffn, reference.partial_gelu_ffn, tensors, dtype, **static)


@FLOATS
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("norm", "width", "per"), [("layer", 6, "each"), ("rms", None, ""), (None, 12, "all")])
def test_queries_and_keys_are_turned(norm, width, per, layout, dtype):
    tensors = turned_operands(2, 19, 24, 2, 12, 8, 1, width, per, None if norm is None else 1e-5)
    static = static_of(2, 12, norm_eps=1e-6, norm="rms", residual=True, rotary_layout=layout)
    if norm is not None:
        static |= {"qk_norm": norm, "qk_norm_eps": 1e-5}
    rounded = {n: t.to(dtype) for n, t in tensors.items()}
    wide = {n: t.double() for n, t in rounded.items()}
    ours = rep_attention(**rounded, **static)
    assert_follows_rule(ours, reference.rep_attention(**rounded, **static), reference.rep_attention(**wide, **static))


def test_rows_of_any_strides():
    tensors = {n: t.float() for n, t in turned_operands(2, 19, 24, 2, 12, 8, 1, 12).items()}
    static = static_of(2, 12, rotary_layout="half")
    expected = rep_attention(**tensors, **static)
    both = torch.cat([tensors["rotary_sin"], tensors["rotary_cos"]], dim=-1)
    sin, cos = both.chunk(2, dim=-1)  # as timm hands them on
    tensors |= {"x": randn(2, 24, 19).float().copy_(tensors["x"].mT).mT, "rotary_cos": cos, "rotary_sin": sin}
    torch.testing.assert_close(rep_attention(**tensors, **static), expected)
