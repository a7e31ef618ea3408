"""The operator patch_projection: patch embedding and patch merging, on every backend this machine has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import DTYPES, cast, check_operator, randn, weight

from repavit_ops import ops, reference
from repavit_ops.nn import PatchProjection

CASES = {  # batch, channels, H, W, patch, N, channels_last
    "deit_tiny": (2, 3, 64, 48, (16, 16), 192, False),
    "dinov2": (1, 3, 28, 42, (14, 14), 96, False),
    "swin_embed": (1, 3, 20, 24, (4, 4), 96, False),
    "swin_merging": (2, 96, 14, 10, (2, 2), 192, True),
    "primes": (1, 5, 23, 29, (3, 7), 37, False),
    "one_pixel": (2, 7, 3, 5, (1, 1), 11, True),
    "rest_left_out": (1, 3, 17, 19, (4, 4), 33, True),
    "map_smaller_than_patch": (1, 3, 3, 8, (4, 4), 8, False),
    "no_images": (0, 3, 8, 8, (4, 4), 8, False),
    "no_channels": (1, 0, 8, 8, (4, 4), 5, True),
    "no_outputs": (1, 3, 8, 8, (4, 4), 0, False),
}


def operands(batch, channels, h, w, patch, n, channels_last, seed=0):
    """x, weight, bias in float64."""
    size = (batch, h, w, channels) if channels_last else (batch, channels, h, w)
    return randn(*size, seed=seed), weight(n, channels * patch[0] * patch[1], seed + 1), randn(n, seed=seed + 2)


@pytest.mark.parametrize("norm_eps", [None, 1e-5], ids=["", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_truth_at_every_shape(case, dtype, norm_eps):
    if norm_eps is not None and case[1] == 0:
        pytest.skip("the LayerNorm of no elements is not defined")
    static = {"patch": case[4], "channels_last": case[6], "norm_eps": norm_eps}
    check_operator(ops.patch_projection, reference.patch_projection, operands(*case), dtype, **static)


@pytest.mark.parametrize("name", ["deit_tiny", "dinov2", "primes"])
def test_is_the_convolution_whose_stride_is_its_kernel(name):
    case = CASES[name]
    x, w, b = operands(*case)
    convolved = F.conv2d(x, w.view(case[5], case[1], *case[4]), b, stride=case[4])
    projected = ops.patch_projection(x, w, b, patch=case[4])
    torch.testing.assert_close(projected.permute(0, 3, 1, 2), convolved, rtol=1e-12, atol=1e-12)


def test_tangents_are_not_lost():
    """Forward mode through every operand at once."""
    tensors = operands(*CASES["primes"])
    tangents = tuple(torch.ones_like(t) for t in tensors)
    static = {"patch": CASES["primes"][4], "channels_last": False}
    ours, expected = (
        torch.func.jvp(lambda *t, f=f: f(*t, **static), tensors, tangents)
        for f in (ops.patch_projection, reference.patch_projection)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_strided_inputs_equal_contiguous_ones(channels_last):
    x, w, _ = cast(operands(2, 5, 12, 20, (4, 4), 9, channels_last), torch.float32)
    static = {"patch": 4, "channels_last": channels_last}
    expected = ops.patch_projection(x, w, None, **static)
    wide = torch.full((2, *(2 * s for s in x.shape[1:])), torch.nan)
    every_second = wide[:, ::2, ::2, ::2].copy_(x)
    inner = torch.full([s + 3 for s in x.shape], torch.nan)[1:3, 1:-2, 2:-1, 1:-2].copy_(x)
    for variant in (every_second, inner, x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(ops.patch_projection(variant, w, None, **static), expected, rtol=0, atol=0)


def test_packed_weight_gives_the_same_and_a_foreign_one_raises():
    x, w, b = cast(operands(*CASES["deit_tiny"]), torch.float32)
    packed = torch.ops.repavit_ops.patch_projection_pack(w)
    assert torch.equal(ops.patch_projection(x, w, b, patch=16, packed=packed), ops.patch_projection(x, w, b, patch=16))
    assert torch.equal(torch.ops.repavit_ops.patch_projection_unpack(packed)[0], w)
    with pytest.raises(RuntimeError, match="pack the weight again"):
        ops.patch_projection(x, w[:-1], b[:-1], patch=16, packed=packed)
    with pytest.raises(RuntimeError, match="not the result of patch_projection_pack"):
        ops.patch_projection(x, w, b, patch=16, packed=packed[:100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": randn(3, 8, 8)}, r"x: got shape \[3, 8, 8\], wanted \[B, C, H, W\]"),
        ({"patch": 0}, r"patch: got \(0, 0\)"),
        ({"patch": 3}, r"weight: got shape \[7, 48\], wanted \[N, 27\]"),
        ({"bias": randn(6)}, r"bias: got shape \[6\], wanted \[7\]"),
        ({"bias": randn(7).float()}, r"bias: got torch.float32, but x is torch.float64"),
        ({"norm_eps": -1.0}, "norm_eps: got -1.0"),
        ({"backend": "triton"}, "backend"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    arguments = {"x": randn(1, 3, 8, 8), "weight": weight(7, 48, 1), "bias": randn(7), "patch": 4, **change}
    x, w, b = (arguments.pop(name) for name in ("x", "weight", "bias"))
    with pytest.raises(ValueError, match=message):
        ops.patch_projection(x, w, b, **arguments)


def test_module_pads_and_keeps_the_layout():
    x = randn(2, 6, 7, 5)
    module = PatchProjection(5, 9, 2, channels_last=True, norm_eps=1e-5, pad=True, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 1))
    expected = reference.patch_projection(
        padded, module.weight, module.bias, patch=(2, 2), channels_last=True, norm_eps=1e-5
    )
    torch.testing.assert_close(module(x), expected)
    image = PatchProjection(3, 8, (4, 2), bias=False)
    assert image(torch.zeros(2, 3, 8, 6)).shape == (2, 8, 2, 3)
