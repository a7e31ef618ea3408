"""Any argument of any operator may require grad, whether the call uses it or not."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_gated_ffn import operands as gated_operands
from test_partial_gelu_ffn import operands as ffn_operands
from test_patch_projection import operands as patch_operands
from test_rep_attention import operands as attention_operands
from test_window_rep_attention import operands as window_operands

from repavit_ops import ops, reference

OP = torch.ops.repavit_ops


def attention_case():
    tensors, static = attention_operands(1, 3, 4, 2, 2, 2)
    bias = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (*tensors, bias), static


def window_case(size, shift):
    return window_operands(1, *size, 4, 2, 2, [2, 2], shift)


CASES = {  # name → (operator, reference, operands, keyword arguments, which operands are optional)
    "partial_gelu_ffn": ("partial_gelu_ffn", (ffn_operands(2, 4, 3), {}), (2, 4, 5)),
    "partial_gelu_ffn_m_zero": ("partial_gelu_ffn", (ffn_operands(2, 4, 0), {}), (2, 4, 5)),
    "rep_attention": ("rep_attention", attention_case(), (2, 4, 5)),
    "gated_ffn": ("gated_ffn", ((*gated_operands(2, 4, 3)[:6], None, None), {"activation": "silu"}), (2, 4)),
    "window_nothing_padded": ("window_rep_attention", window_case((2, 2), [0, 0]), (2, 4, 6)),
    "window_shifted": ("window_rep_attention", window_case((4, 4), [1, 1]), (2, 4, 6)),
    "window_padded": ("window_rep_attention", window_case((3, 2), [0, 0]), (2, 4, 6)),
    "patch_projection": (
        "patch_projection",
        (patch_operands(1, 2, 4, 4, (2, 2), 3, False), {"patch": [2, 2], "channels_last": False}),
        (2,),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def subsets(items):
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))


def combinations(tensors, optional):
    """Every choice of absent arguments and of those that require grad, at least one."""
    for absent in subsets(optional):
        present = [i for i, t in enumerate(tensors) if i not in absent and t is not None]
        for wanted in subsets(present):
            if wanted:
                yield absent, wanted


def gradients(function, tensors, static, absent, wanted):
    leaves = [
        None if i in absent or t is None else t.detach().clone().requires_grad_(i in wanted)
        for i, t in enumerate(tensors)
    ]
    y = function(*leaves, **static)
    inputs = [leaves[i] for i in wanted]
    if not y.requires_grad:  # the formula without the only argument that could get a gradient
        return [torch.zeros_like(t) for t in inputs]
    return torch.autograd.grad(y.square().sum(), inputs, materialize_grads=True)


@every_case
def test_every_combination_gives_the_gradients_of_the_formula(name):
    operator, (tensors, static), optional = CASES[name]
    for absent, wanted in combinations(tensors, optional):
        expected = gradients(getattr(reference, operator), tensors, static, absent, wanted)
        ours = gradients(getattr(OP, operator), tensors, static, absent, wanted)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, case=(absent, wanted): f"{case}: {text}")


@every_case
def test_all_of_them_through_backward(name):
    operator, (tensors, static), _ = CASES[name]
    leaves = [None if t is None else t.float().requires_grad_() for t in tensors]
    getattr(OP, operator)(*leaves, **static).sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves if t is not None)


def test_a_window_that_pads_nothing_gives_pad_kv_no_gradient():
    """The smallest case: no fused Swin could be differentiated with its default parameters."""
    x, *weights, rel_bias, pad_kv = window_case((2, 2), [0, 0])[0]
    static = window_case((2, 2), [0, 0])[1]
    x, pad_kv = x.clone().requires_grad_(), pad_kv.clone().requires_grad_()
    ops.window_rep_attention(x, *weights, rel_bias=rel_bias, pad_kv=pad_kv, **static).sum().backward()
    assert x.grad is not None
    assert torch.equal(pad_kv.grad, torch.zeros_like(pad_kv))


def test_an_argument_that_enters_nothing_may_be_the_only_one():
    tensors, static = window_case((2, 2), [0, 0])
    pad_kv = tensors[6].clone().requires_grad_()
    y = OP.window_rep_attention(*tensors[:6], pad_kv, **static)
    (grad,) = torch.autograd.grad(y.sum(), [pad_kv])
    assert torch.equal(grad, torch.zeros_like(pad_kv))


@pytest.mark.parametrize("absent", [(), (2, 4, 6)], ids=str)
def test_second_derivatives_where_nothing_was_padded(absent):
    tensors, static = window_case((2, 2), [0, 0])
    leaves = [None if i in absent or t is None else t.clone().requires_grad_() for i, t in enumerate(tensors)]
    present = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(OP.window_rep_attention(*leaves, **static).square().sum(), present, create_graph=True)
    total = sum(g.square().sum() for g in grads)
    assert all(g is not None for g in torch.autograd.grad(total, present, materialize_grads=True))
