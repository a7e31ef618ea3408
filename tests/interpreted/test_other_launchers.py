"""Operators that are made of other kernels: patches through linear, runs of blocks through their launchers."""

from __future__ import annotations

import pytest
import torch
from op_helpers import check_operator, randn, weight

from repavit_ops import nn, reference, stack_plan
from repavit_ops.kernels.fused_blocks import fused_blocks
from repavit_ops.kernels.patch_projection import patch_projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["image", "map"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5], ids=["no_norm", "norm"])
def test_patches_with_a_rest(norm_eps, channels_last, dtype):
    x = randn(2, 9, 11, 3) if channels_last else randn(2, 3, 9, 11)
    static = {"patch": (4, 2), "channels_last": channels_last, "norm_eps": norm_eps}
    tensors = (x, weight(10, 24, 1), randn(10, seed=2))
    check_operator(patch_projection, reference.patch_projection, tensors, dtype, **static)


def test_run_of_blocks():
    torch.manual_seed(0)
    modules = [
        nn.WindowRepAttention(16, 1, 2, 1, norm_eps=1e-5, residual=True),
        nn.PartialGELUFFN(16, 8, norm_eps=1e-5, residual=True),
    ]
    x = randn(1, 4, 4, 16).float()
    weights, plan, scalars = stack_plan.encode(module.step((4, 4)) for module in modules)
    with torch.no_grad():
        expected = modules[1](modules[0](x))
        ours = fused_blocks(x, weights, plan=plan, scalars=scalars)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_whole_model_runs_its_ends_too():
    """Embedding and head have no kernel of their own; a merging between blocks has."""
    static = {"patch": (2, 2), "as_map": True, "norm_eps": 1e-5}
    norm = (torch.ones(16), torch.zeros(16))
    merging = nn.PatchProjection(16, 24, 2, channels_last=True, norm_eps=1e-5)
    merged = {"patch": (2, 2), "channels_last": True, "norm_eps": 1e-5}
    steps = [
        stack_plan.Step("token_embedding", (weight(16, 12, 1).float(), None, None, None, *norm), static),
        nn.PartialGELUFFN(16, 8, norm_eps=1e-5, residual=True).step(),
        stack_plan.Step("patch_projection", (merging.weight, merging.bias), merged),
        stack_plan.Step("pooled_head", (None,) * 4, {"first": 0, "count": 0, "norm_eps": None}),
    ]
    x = randn(1, 3, 8, 8).float()
    weights, plan, scalars = stack_plan.encode(steps)
    with torch.no_grad():
        expected = reference.fused_blocks(x, weights, plan=plan, scalars=scalars)
        ours = fused_blocks(x, weights, plan=plan, scalars=scalars)
    assert ours.shape == (1, 24)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
