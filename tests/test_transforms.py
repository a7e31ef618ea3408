"""torch.func on operators and fused models: each transform gives what it gives of the model that is not fused."""

from __future__ import annotations

import copy

import pytest
import torch
from case_helpers import OPERATORS, case, public, registered
from model_helpers import images, tiny_swin, tiny_vit
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap

import repavit_ops

SIZES = {tiny_vit: 32, tiny_swin: 64}
builders = pytest.mark.parametrize("build", SIZES, ids=["vit", "swin"])
every_operator = pytest.mark.parametrize("name", OPERATORS)
both_ways = pytest.mark.parametrize("call", [registered, public])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def operator_of(name, call):
    """The operator as a function of x and its first weight, and those two."""
    (x, w, *others), static = case(name)

    def run(x, w):
        return call(name, [x, w, *others[:-1], None], static)

    return run, x, w


@both_ways
@every_operator
def test_vmap_over_inputs_and_over_weights(name, call):
    run, x, w = operator_of(name, call)
    xs, ws = torch.stack((x, x * 0.5, -x)), torch.stack((w, w * 2, -w))
    for over_x, over_w in ((0, 0), (0, None), (None, 0)):
        y = vmap(run, (over_x, over_w))(xs if over_x == 0 else x, ws if over_w == 0 else w)
        for i in range(3):
            expected = run(xs[i] if over_x == 0 else x, ws[i] if over_w == 0 else w)
            torch.testing.assert_close(y[i], expected, **CLOSE)


@both_ways
@every_operator
def test_gradients_of_each_sample(name, call):
    run, x, w = operator_of(name, call)
    xs = torch.stack((x, x * 0.5))
    each = vmap(grad(lambda w, x: run(x, w).square().sum()), (None, 0))(w, xs)
    for i in range(2):
        leaf = w.clone().requires_grad_()
        run(xs[i], leaf).square().sum().backward()
        torch.testing.assert_close(each[i], leaf.grad, rtol=1e-3, atol=1e-4)


@both_ways
def test_jacobians_nested_transforms_and_compilation(call):
    run, x, w = operator_of("partial_gelu_ffn", call)
    forward, backward = (f(lambda x: run(x, w))(x) for f in (torch.func.jacfwd, jacrev))
    torch.testing.assert_close(forward, backward, **CLOSE)
    assert hessian(lambda x: run(x, w).sum())(x).shape == (*x.shape, *x.shape)
    compiled = torch.compile(vmap(lambda x: run(x, w)), fullgraph=True)
    xs = torch.stack((x, -x))
    torch.testing.assert_close(compiled(xs), torch.stack((run(x, w), run(-x, w))), **CLOSE)


@builders
def test_models_stacked_over_their_weights(build):
    models = [repavit_ops.fuse(build(seed)) for seed in (1, 2)]
    x = images(2, SIZES[build])
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    with torch.no_grad():
        for one, model in zip(y, models, strict=True):
            torch.testing.assert_close(one, model(x), **CLOSE)


@builders
def test_gradients_of_each_image_of_a_fused_model(build):
    fused, x = repavit_ops.fuse(build()), images(2, SIZES[build])
    with torch.no_grad():
        fused(x)  # so that there are packed copies and routes to leave alone
    parameters = {name: p.detach() for name, p in fused.named_parameters()}
    each = vmap(grad(lambda p, image: functional_call(fused, p, (image[None],)).sum()), (None, 0))(parameters, x)
    for i in range(2):
        fused.zero_grad()
        fused(x[i : i + 1]).sum().backward()
        for name, p in fused.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(each[name][i], expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_weights_that_are_not_there_are_refused_by_name():
    fused, x = repavit_ops.fuse(tiny_vit(), keep_unpacked=False), images(2, 32)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"keep_unpacked=False.*no torch\.func"):
        vmap(lambda image: fused(image[None]))(x)
