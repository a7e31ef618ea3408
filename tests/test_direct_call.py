"""The short way to a CPU kernel (ops/_direct.py): taken where nothing is lost, and what it refuses is named as ever."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from op_helpers import cast
from test_gated_ffn import operands as gated_operands
from test_partial_gelu_ffn import operands as ffn_operands
from test_rep_attention import op as attention
from test_rep_attention import operands as attention_operands
from test_window_rep_attention import op as windows
from test_window_rep_attention import operands as window_operands
from torch.nn.attention import SDPBackend, sdpa_kernel

from repavit_ops import backends, ops, reference
from repavit_ops.ops import _direct

pytestmark = pytest.mark.skipif(backends.why_unavailable("cpp") is not None, reason="the C++ library is not built")


def cases():
    operands, heads = attention_operands(2, 5, 8, 2, 3, 4)
    window_tensors, windowed = window_operands(2, 5, 6, 8, 2, 4, [4, 4], [2, 2])
    return {
        "partial_gelu_ffn": (cast(ffn_operands(3, 8, 5), torch.float32), {}),
        "gated_ffn": (cast(gated_operands(3, 8, 5), torch.float32), {"activation": "silu"}),
        "rep_attention": (cast((*operands, None), torch.float32), heads),
        "window_rep_attention": (cast(window_tensors, torch.float32), windowed),
    }


CASES = cases()
every_operator = pytest.mark.parametrize("name", CASES)


def run(name, tensors, **static):
    """The public function, every operand positional as the reference takes it."""
    calls = {
        "partial_gelu_ffn": ops.partial_gelu_ffn,
        "gated_ffn": ops.gated_ffn,
        "rep_attention": attention,
        "window_rep_attention": windows,
    }
    return calls[name](*tensors, **static)


@pytest.fixture
def ways(monkeypatch):
    """How often each way was taken, short and long."""
    taken = []
    short = _direct.call

    def call(*args, **static):
        y = short(*args, **static)
        taken.append("long" if y is None else "short")
        return y

    monkeypatch.setattr(_direct, "call", call)
    return taken


@every_operator
def test_short_without_derivatives(name, ways):
    tensors, static = CASES[name]
    expected = getattr(reference, name)(*tensors, **static)
    torch.testing.assert_close(run(name, tensors, **static), expected)
    run(name, tensors, norm_eps=1e-6, backend="cpp", **static)
    leaves = tuple(t if t is None else t.clone().requires_grad_() for t in tensors)
    with torch.no_grad():
        run(name, leaves, **static)
    with torch.inference_mode():
        run(name, tensors, **static)
    assert ways == ["short"] * 4


@every_operator
def test_long_where_the_short_way_would_lose_something(name, ways):
    tensors, static = CASES[name]
    leaves = tuple(t if t is None else t.clone().requires_grad_() for t in tensors)
    run(name, leaves, **static).sum().backward()
    assert all(t is None or t.grad is not None for t in leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(name, tensors, **static).dtype == torch.bfloat16
    assert run(name, tuple(t if t is None else t.to("meta") for t in tensors), **static).is_meta
    run(name, tensors, backend="reference", **static)
    assert ways == ["long"] * 4


@every_operator
def test_tangents_are_not_lost(name):
    """Forward mode: J v by the operator and by the formula, through every operand at once."""
    tensors, static = CASES[name]
    present = tuple(t.double() for t in tensors if t is not None)
    tangents = tuple(torch.ones_like(t) for t in present)

    def filled(*values):
        rest = iter(values)
        return tuple(None if t is None else next(rest) for t in tensors)

    def formula(*values):
        return getattr(reference, name)(*filled(*values), **static)

    def operator(*values):
        return run(name, filled(*values), **static)

    with sdpa_kernel(SDPBackend.MATH):  # the only SDPA that has a forward-mode derivative; others refuse
        expected = torch.func.jvp(formula, present, tangents)
        torch.testing.assert_close(torch.func.jvp(operator, present, tangents), expected)
        with forward_ad.dual_level():
            y = operator(*map(forward_ad.make_dual, present, tangents))
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected[1])


def spoiled(tensors):
    """The operands with one of them wrong in some way, each in turn."""
    for i, t in enumerate(tensors):
        if t is None:
            continue
        for bad in (t[..., :-1], t[:-1], t.unsqueeze(0), t[0], t.double(), t.to(torch.int32), t.to("meta"), t[..., :0]):
            yield (*tensors[:i], bad, *tensors[i + 1 :])


BAD_OPTIONS = {
    "partial_gelu_ffn": [{"approximate": "erf"}, {"norm": "batch"}],
    "gated_ffn": [{"activation": "erf"}, {"inner_norm_eps": -1.0}],
    "rep_attention": [{"num_heads": 0}, {"num_heads": 3}, {"d_qk": 0}, {"d_qk": 5}, {"inner_norm_eps": -1.0}],
    "window_rep_attention": [{"num_heads": 0}, {"window": [0, 4]}, {"shift": [4, 0]}, {"shift": [0, -1]}],
}


@every_operator
def test_both_ways_refuse_and_accept_the_same(name, monkeypatch):
    tensors, static = CASES[name]
    cases = [(operands, static) for operands in spoiled(tensors)]
    cases += [(tensors, {**static, "norm_eps": eps}) for eps in (-1.0, float("nan"))]
    cases += [(tensors, {**static, **options}) for options in BAD_OPTIONS[name]]

    def outcomes():
        for operands, options in cases:
            try:
                yield "accepted", tuple(run(name, operands, **options).shape)
            except (ValueError, RuntimeError) as error:
                yield type(error).__name__, str(error)

    short_first = list(outcomes())
    monkeypatch.setattr(_direct, "call", lambda *args, **options: None)
    assert short_first == list(outcomes())
    assert sum(kind == "ValueError" for kind, _ in short_first) > len(cases) / 2
