"""Registration of every operator: schema, fake, autograd, autocast, torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from op_helpers import assert_follows_rule, cast, randn
from test_gated_ffn import operands as gated_operands
from test_partial_gelu_ffn import operands as ffn_operands
from test_rep_attention import operands as attention_operands
from test_window_rep_attention import operands as window_operands

import repavit_ops.ops
from repavit_ops import library, reference

torch_ops = torch.ops.repavit_ops


def cases():
    """name → (registered operator, reference, float64 tensors, static arguments), small enough for gradcheck."""
    attention, heads = attention_operands(2, 5, 8, 2, 3, 4)
    window, windows = window_operands(2, 5, 6, 8, 2, 4, [4, 4], [2, 2])
    bias = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    both = {"norm_eps": 1e-5, "residual": True}
    angles = randn(4, 2, seed=5)
    turned = (*attention, bias, angles.cos(), angles.sin(), randn(2, 3, seed=6), randn(2, 3, seed=7))
    gated = {"activation": "silu", "norm": "rms", "inner_norm_eps": 1e-2, **both}
    norms = {"qk_norm_eps": 1e-2, "inner_norm_eps": 1e-2}
    return {
        "partial_gelu_ffn": (reference.partial_gelu_ffn, ffn_operands(3, 8, 5), both),
        "partial_gelu_ffn_tanh": (reference.partial_gelu_ffn, ffn_operands(3, 8, 5), {"approximate": "tanh"}),
        "partial_gelu_ffn_quick": (reference.partial_gelu_ffn, ffn_operands(3, 8, 5), {"approximate": "quick"}),
        "partial_gelu_ffn_m_zero": (reference.partial_gelu_ffn, ffn_operands(3, 8, 0), {"residual": True}),
        "gated_ffn": (reference.gated_ffn, gated_operands(3, 8, 5), gated),
        "gated_ffn_gelu": (reference.gated_ffn, gated_operands(3, 8, 5), {"activation": "gelu"}),
        "rep_attention_turned": (reference.rep_attention, turned, {**heads, **norms}),
        "rep_attention": (reference.rep_attention, (*attention, bias), {**heads, **both}),
        "window_rep_attention": (reference.window_rep_attention, window, {**windows, **both}),
        "window_rep_attention_roll_first": (reference.window_rep_attention, window, {**windows, "roll_first": True}),
    }


CASES = cases()
every_case = pytest.mark.parametrize("name", CASES)


def registered(name):
    operator = next(o for o in sorted(library.OPERATORS, key=lambda o: -len(o.name)) if name.startswith(o.name))
    return getattr(torch_ops, operator.name)


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("name", ["partial_gelu_ffn", "gated_ffn", "rep_attention_turned", "window_rep_attention"])
def test_opcheck(name):
    """With the gradient of windows in symbolic sizes left out: 40 s, for what the next test has in the batch's."""
    _, tensors, static = CASES[name]
    tensors = tuple(t.float().requires_grad_() for t in tensors)
    kinds = OPCHECK if name == "window_rep_attention" else (*OPCHECK, "test_aot_dispatch_dynamic")
    torch.library.opcheck(registered(name).default, tensors, static, test_utils=kinds)


def test_gradients_of_windows_at_any_batch():
    torch._dynamo.reset()
    _, tensors, static = CASES["window_rep_attention"]
    x, *weights = (t.float().requires_grad_() for t in tensors)
    compiled = torch.compile(
        lambda *t: registered("window_rep_attention")(*t, **static), fullgraph=True, backend="aot_eager"
    )
    for batch in (2, 3):
        some = x[:1].detach().expand(batch, -1, -1, -1).clone().requires_grad_()
        torch._dynamo.mark_dynamic(some, 0)
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            ours = torch.autograd.grad(compiled(some, *weights).square().sum(), (some, *weights))
        theirs = torch.autograd.grad(
            reference.window_rep_attention(some, *weights, **static).square().sum(), (some, *weights)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_opcheck_without_optional_tensors():
    x, w_in, _, w_out, _, _ = ffn_operands(3, 8, 5)
    torch.library.opcheck(torch_ops.partial_gelu_ffn.default, (x, w_in, None, w_out, None, None))


@every_case
def test_gradcheck(name):
    _, tensors, static = CASES[name]
    tensors = tuple(t.clone().requires_grad_() for t in tensors)
    fast = "attention" in name  # random projections of the Jacobian: theirs is large
    assert torch.autograd.gradcheck(lambda *t: registered(name)(*t, **static), tensors, fast_mode=fast)


def test_second_derivatives():
    tensors = tuple(t.clone().requires_grad_() for t in ffn_operands(2, 4, 3))
    assert torch.autograd.gradgradcheck(lambda *t: torch_ops.partial_gelu_ffn(*t, residual=True), tensors)


@every_case
def test_gradients_equal_those_of_the_reference(name):
    reference_fn, tensors, static = CASES[name]
    ours = tuple(t.float().requires_grad_() for t in tensors)
    theirs = tuple(t.float().requires_grad_() for t in tensors)
    registered(name)(*ours, **static).square().sum().backward()
    reference_fn(*theirs, **static).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one():
    tensors = list(ffn_operands(3, 8, 5))
    tensors[1].requires_grad_()
    torch_ops.partial_gelu_ffn(*tensors).sum().backward()
    assert [t.grad is not None for t in tensors] == [False, True, False, False, False, False]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["partial_gelu_ffn", "gated_ffn", "rep_attention_turned", "window_rep_attention"])
def test_compiles_in_one_graph(name, dynamic):
    torch._dynamo.reset()
    _, tensors, static = CASES[name]
    tensors = cast(tensors, torch.float32)
    expected = registered(name)(*tensors, **static)
    compiled = torch.compile(
        lambda *t: registered(name)(*t, **static), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*tensors), expected)


def test_functional_forms_compile_with_their_checks():
    torch._dynamo.reset()
    tensors = cast(ffn_operands(3, 8, 5), torch.float32)
    compiled = torch.compile(repavit_ops.ops.partial_gelu_ffn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, residual=True), torch_ops.partial_gelu_ffn(*tensors, residual=True))


@every_case
def test_autocast_runs_in_its_dtype(name):
    reference_fn, tensors, static = CASES[name]
    rounded = cast(cast(tensors, torch.bfloat16), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = registered(name)(*rounded, **static)
    assert y.dtype == torch.bfloat16
    eager = reference_fn(*cast(rounded, torch.bfloat16), **static)
    assert_follows_rule(y, eager, reference_fn(*cast(rounded, torch.float64), **static))


def test_autocast_leaves_float64_alone_and_keeps_gradients():
    tensors = tuple(t.clone().requires_grad_() for t in ffn_operands(3, 8, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch_ops.partial_gelu_ffn(*tensors).dtype == torch.float64
    single = tuple(t.detach().float().requires_grad_() for t in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch_ops.partial_gelu_ffn(*single).float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in single)


@every_case
def test_inference_mode_and_meta(name):
    _, tensors, static = CASES[name]
    with torch.inference_mode():
        y = registered(name)(*cast(tensors, torch.float32), **static)
    shapes_only = registered(name)(*(t.to("meta") for t in tensors), **static)
    assert shapes_only.shape == y.shape
    assert shapes_only.device.type == "meta"


@every_case
def test_any_other_device_runs_the_reference(name):
    """The composite kernel, reached past the CPU key, is the reference itself."""
    reference_fn, tensors, static = CASES[name]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    with torch.no_grad():
        y = registered(name).default.redispatch(keys, *tensors, **static)
    torch.testing.assert_close(y, reference_fn(*tensors, **static))


def test_a_device_of_ours_is_not_asked_whether_autocast_knows_it(monkeypatch):
    x, *weights = (t.float() for t in ffn_operands(3, 8, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        monkeypatch.setattr(
            torch.amp, "is_autocast_available", lambda _: pytest.fail("Dynamo of torch 2.11 stops here")
        )
        y = repavit_ops.ops.partial_gelu_ffn(x.bfloat16(), *weights)
    assert y.dtype == torch.bfloat16
