"""The operator gated_ffn on every backend this machine has, its module, and the merge of channels without a gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import DTYPES, cast, check_operator, randn, weight

from repavit_ops import ops, reference, reparam
from repavit_ops.nn import GatedFFN
from repavit_ops.stack_plan import GATES

SHAPES = {  # tokens, C, m
    "eva02_small": (197, 384, 1024),
    "eva02_tiny": (50, 192, 512),
    "dinov2_giant_tail": (33, 96, 170),
    "m_zero": (17, 48, 0),
    "m_one": (17, 48, 1),
    "m_three": (5, 16, 3),
    "primes": (13, 37, 29),
    "one_token": (1, 64, 64),
    "one_channel": (5, 1, 3),
    "no_tokens": (0, 32, 32),
    "no_channels": (4, 0, 8),
    "off_by_one": (15, 65, 17),
}
SILU = {"activation": "silu"}


def operands(tokens: int, c: int, m: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, w_gate, b_gate, w_up, b_up, w_out, w_merged, bias in float64."""
    return (
        randn(tokens, c, seed=seed),
        weight(m, c, seed + 1),
        randn(m, seed=seed + 2, scale=0.5),
        weight(m, c, seed + 3),
        randn(m, seed=seed + 4, scale=0.5),
        weight(c, m, seed + 5),
        weight(c, c, seed + 6),
        randn(c, seed=seed + 7, scale=0.5),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_truth_at_every_shape(shape, dtype):
    check_operator(ops.gated_ffn, reference.gated_ffn, operands(*shape), dtype, **SILU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "rms"], ids=str)
@pytest.mark.parametrize("inner_norm_eps", [None, 1e-5], ids=["", "inner_norm"])
@pytest.mark.parametrize("activation", GATES)
def test_every_option(dtype, norm, inner_norm_eps, activation):
    static = {"activation": activation, "inner_norm_eps": inner_norm_eps, "residual": activation == "silu"}
    if norm is not None:
        static |= {"norm_eps": 1e-6, "norm": norm}
    check_operator(ops.gated_ffn, reference.gated_ffn, operands(29, 70, 45), dtype, **static)


@pytest.mark.parametrize("absent", [(2,), (4,), (6,), (7,), (2, 4, 6, 7)], ids=str)
def test_absent_operands_add_nothing(absent):
    tensors = tuple(None if i in absent else t for i, t in enumerate(operands(21, 40, 24)))
    check_operator(ops.gated_ffn, reference.gated_ffn, tensors, torch.float32, residual=True, **SILU)


def test_the_formula_is_the_papers():
    x, w_gate, b_gate, w_up, b_up, w_out, _, bias = operands(5, 12, 9)
    hidden = F.silu(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)
    y = ops.gated_ffn(x, w_gate, b_gate, w_up, b_up, w_out, None, bias, inner_norm_eps=1e-5, **SILU)
    torch.testing.assert_close(y, F.linear(F.layer_norm(hidden, (9,), eps=1e-5), w_out, bias))


def test_any_batch_shape_and_strides():
    x, *weights = cast(operands(24, 40, 24), torch.float32)
    expected = ops.gated_ffn(x, *weights, **SILU)
    wide = torch.zeros(24, 80)
    wide[:, ::2] = x
    strided = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
    for given, others in ((wide[:, ::2], weights), (x, strided), (x.view(2, 3, 4, 40), weights)):
        y = ops.gated_ffn(given, *others, **SILU)
        assert y.shape == given.shape
        torch.testing.assert_close(y.reshape(24, 40), expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", GATES)
def test_gates_of_special_values(activation):
    """A gate of NaN or ±Inf gives what the formula gives; huge ones saturate."""
    one = torch.ones(1, 1)
    for value in (float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 0.0, -0.0):
        x = torch.tensor([[value]])
        ours = ops.gated_ffn(x, one, None, torch.zeros(1, 1), torch.ones(1), one, None, None, activation=activation)
        up = F.linear(x, torch.zeros(1, 1), torch.ones(1))
        torch.testing.assert_close(ours, reference.gate(x, activation) * up, equal_nan=True)


BAD = {
    "x_channels": (lambda t: (t[0][:, :-1], *t[1:]), "x: got 7 channels"),
    "w_up_shape": (lambda t: (*t[:3], t[3][:-1], *t[4:]), "w_up: got shape"),
    "w_out_shape": (lambda t: (*t[:5], t[5].t(), *t[6:]), "w_out: got shape"),
    "w_merged_shape": (lambda t: (*t[:6], t[6][:-1], t[7]), "w_merged: got shape"),
    "b_gate_shape": (lambda t: (*t[:2], t[2][:-1], *t[3:]), "b_gate: got shape"),
    "b_up_shape": (lambda t: (*t[:4], t[4][:-1], *t[5:]), "b_up: got shape"),
    "dtype": (lambda t: (*t[:3], t[3].half(), *t[4:]), "w_up: got torch.float16, but x is torch.float64"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_operands_are_named(spoil, message):
    with pytest.raises(ValueError, match=message):
        ops.gated_ffn(*spoil(operands(3, 8, 5)), **SILU)


@pytest.mark.parametrize(
    ("static", "message"),
    [
        ({"activation": "relu"}, "activation: got 'relu'"),
        ({"norm": "batch"}, "norm: got 'batch'"),
        ({"norm_eps": -1.0}, "norm_eps: got -1"),
        ({"inner_norm_eps": -1.0}, "inner_norm_eps: got -1"),
        ({"inner_norm_eps": float("nan")}, "inner_norm_eps: got nan"),
    ],
)
def test_bad_options_are_named(static, message):
    with pytest.raises(ValueError, match=message):
        ops.gated_ffn(*operands(3, 8, 5), **{**SILU, **static})


# --- channels without a gate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [0, 4, 9])
def test_channels_without_a_gate_merge_exactly(gated):
    """The training form: hidden channels from ``gated`` on take 1 for act(gate)."""
    x, w_gate, b_gate, w_up, b_up, w_out, _, bias = operands(7, 6, 9)
    scale, shift, layer_scale = randn(6, seed=11), randn(6, seed=12), randn(6, seed=13)
    z = reference.layer_norm_core(x, 1e-6) * scale + shift
    gates = F.silu(F.linear(z, w_gate, b_gate))
    gates[:, gated:] = 1.0
    expected = x + layer_scale * F.linear(gates * F.linear(z, w_up, b_up), w_out, bias)
    merged = reparam.merge_gated_ffn(
        *(w_gate[:gated], b_gate[:gated], w_up, b_up, w_out, bias),
        input_affine=reparam.Affine(scale, shift),
        output_scale=layer_scale,
    )
    module = GatedFFN.from_merged(merged, dtype=torch.float64, activation="silu", norm_eps=1e-6)
    assert (module.w_merged is None) == (gated == 9)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_an_inner_norm_folds_and_refuses_idle_channels():
    x, w_gate, b_gate, w_up, b_up, w_out, _, bias = operands(7, 6, 9)
    inner = reparam.Affine(randn(9, seed=11), randn(9, seed=12))
    merged = reparam.merge_gated_ffn(w_gate, b_gate, w_up, b_up, w_out, bias, inner_affine=inner, shortcut=False)
    module = GatedFFN.from_merged(merged, dtype=torch.float64, activation="gelu", inner_norm_eps=1e-5)
    hidden = F.layer_norm(F.gelu(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up), (9,), *inner, 1e-5)
    torch.testing.assert_close(module(x), F.linear(hidden, w_out, bias), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="inner_affine: got a norm over 9 channels of which 5 are idle"):
        reparam.merge_gated_ffn(w_gate[:4], None, w_up, None, w_out, None, inner_affine=inner)
    with pytest.raises(ValueError, match="act_channels"):
        reparam.merge_gated_ffn(w_gate, None, w_up[:4], None, w_out[:, :4], None)


def test_module_defaults_are_a_swiglu():
    module = GatedFFN(12, 20).eval()
    x = randn(3, 12).float()
    with torch.no_grad():
        hidden = F.silu(F.linear(x, module.w_gate, module.b_gate)) * F.linear(x, module.w_up, module.b_up)
        torch.testing.assert_close(module(x), F.linear(hidden, module.w_out, module.bias))
    with pytest.raises(ValueError, match="act_channels"):
        GatedFFN(4, -1)
    with pytest.raises(ValueError, match="activation: got 'glu'"):
        GatedFFN(4, 4, activation="glu")
