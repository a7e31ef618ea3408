"""Norms as affine maps and their folds into a Linear; the rounding at the end."""

import pytest
import torch
import torch.nn.functional as F
from reparam_helpers import EXACT, Draw, affine_of, apply_norm, core, relative_error

from repavit_ops.reparam import (
    Affine,
    batchnorm_affine,
    cast,
    compose,
    fold_affine_into_input,
    fold_affine_into_output,
    fold_output_scale,
    layernorm_affine,
    repbn_affine,
)


def apply(affine, x):
    return x * affine.scale + affine.shift


@pytest.mark.parametrize(
    ("low", "high"), [(0.3, 2.0), (1e-12, 1e-9), (0.0, 0.0)], ids=["usual", "tiny_var", "zero_var"]
)
def test_batchnorm_is_its_affine(low, high):
    draw = Draw(1)
    norm = draw.batchnorm(24, low, high)
    x = draw.normal(13, 24)
    assert relative_error(apply(affine_of(norm), x), norm(x)) <= EXACT


def test_batchnorm_without_affine():
    draw = Draw(2)
    x, mean, var = draw.normal(13, 24), draw.normal(24), draw.uniform(24, low=0.1, high=2)
    wanted = F.batch_norm(x, mean, var, eps=1e-5)
    assert relative_error(apply(batchnorm_affine(None, None, mean, var, 1e-5), x), wanted) <= EXACT


def test_batchnorm_in_low_precision_folds_in_float64():
    draw = Draw(3)
    stored = [
        t.to(torch.float16) for t in (draw.normal(8), draw.normal(8), draw.normal(8), draw.uniform(8, low=0.1, high=2))
    ]
    x = draw.normal(5, 8)
    affine = batchnorm_affine(*stored, 1e-5)
    gamma, beta, mean, var = (t.double() for t in stored)
    assert affine.scale.dtype == affine.shift.dtype == torch.float64
    assert relative_error(apply(affine, x), F.batch_norm(x, mean, var, gamma, beta, eps=1e-5)) <= EXACT


@pytest.mark.parametrize("given", ["both", "weight", "bias", "none"])
def test_layernorm_affine_follows_its_core(given):
    draw = Draw(4)
    weight = draw.normal(24) if given in ("both", "weight") else None
    bias = draw.normal(24) if given in ("both", "bias") else None
    x = draw.normal(13, 24)
    affine = layernorm_affine(weight, bias, dim=24)
    assert relative_error(apply(affine, core(x, 1e-6)), F.layer_norm(x, (24,), weight, bias, 1e-6)) <= EXACT


@pytest.mark.parametrize("alpha", [0.7, torch.ones(1), torch.linspace(-1, 1, 24)], ids=["number", "slab", "channel"])
def test_repbn_adds_alpha_x(alpha):
    draw = Draw(5)
    norm, x = draw.batchnorm(24), draw.normal(13, 24)
    assert relative_error(apply(repbn_affine(affine_of(norm), alpha), x), norm(x) + alpha * x) <= EXACT


def test_compose_applies_first_then_second():
    draw = Draw(6)
    first, second, x = draw.batchnorm(24), draw.batchnorm(24), draw.normal(13, 24)
    both = compose(affine_of(first), affine_of(second))
    assert relative_error(apply(both, x), second(first(x))) <= EXACT
    assert relative_error(apply(both, x), first(second(x))) > 0.1


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("low", [0.3, 1e-12], ids=["usual", "tiny_var"])
def test_norm_before_linear(with_bias, low):
    draw = Draw(7)
    norm, x, w = draw.batchnorm(24, low, low * 5), draw.normal(13, 24), draw.weight(40, 24)
    b = draw.normal(40) if with_bias else None
    folded = fold_affine_into_input(w, b, affine_of(norm))
    assert relative_error(F.linear(x, *folded), F.linear(norm(x), w, b)) <= EXACT


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_before_norm(with_bias):
    draw = Draw(8)
    norm, x, w = draw.batchnorm(40), draw.normal(13, 24), draw.weight(40, 24)
    b = draw.normal(40) if with_bias else None
    folded = fold_affine_into_output(w, b, affine_of(norm))
    assert relative_error(F.linear(x, *folded), norm(F.linear(x, w, b))) <= EXACT


@pytest.mark.parametrize(
    "scale", [0.5, torch.tensor(0.5), torch.linspace(0.1, 1, 40)], ids=["number", "0-d", "channel"]
)
def test_output_scale_scales_the_bias_too(scale):
    draw = Draw(9)
    x, w, b = draw.normal(13, 24), draw.weight(40, 24), draw.normal(40)
    wanted = F.linear(x, w, b) * scale
    w_folded, b_folded = fold_output_scale(w, b, scale)
    assert relative_error(F.linear(x, w_folded, b_folded), wanted) <= EXACT
    assert relative_error(F.linear(x, w_folded, b), wanted) > 0.1  # the bias left unscaled: a published bug


def test_the_affine_broadcasts_over_any_batch_rank():
    draw = Draw(10)
    norm, x = draw.batchnorm(24), draw.normal(2, 3, 5, 24)
    assert relative_error(apply(affine_of(norm), x), apply_norm(norm, x)) <= EXACT


# --- Refusals ---------------------------------------------------------------------------------------------------------

ONES = torch.ones(8)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ((ONES, ONES, None, ONES), r"running_mean: got None.*track_running_stats"),
        ((ONES, ONES, ONES, None), r"running_var: got None"),
        ((ONES, ONES, torch.ones(7), ONES), r"running_mean: got shape \[7\], wanted \[C=8\]"),
        ((torch.ones(9), ONES, ONES, ONES), r"weight: got shape \[9\], wanted \[C=8\]"),
        ((ONES, torch.ones(8, 1), ONES, ONES), r"bias: got shape \[8, 1\]"),
        ((ONES, ONES, ONES, torch.full((8,), 1e5).half()), r"running_var: got values in \[inf, inf\].*fp16"),
        ((ONES, ONES, ONES, -ONES), r"running_var: got values in \[-1, -1\]"),
        ((ONES, ONES, ONES, ONES * float("nan")), r"running_var: got values"),
        (
            (ONES, ONES, ONES, torch.ones(8, dtype=torch.int64)),
            r"running_var: got dtype torch.int64, wanted a float",
        ),
    ],
)
def test_batchnorm_refuses(statistics, message):
    with pytest.raises(ValueError, match=message):
        batchnorm_affine(*statistics, 1e-5)


def test_folds_name_the_argument_that_disagrees():
    affine = Affine(torch.ones(24), torch.zeros(24))
    with pytest.raises(ValueError, match=r"affine.scale: got shape \[24\], wanted \[C=8\]"):
        fold_affine_into_input(torch.ones(24, 8), None, affine)
    with pytest.raises(ValueError, match=r"affine.scale: got shape \[24\], wanted \[C=8\]"):
        fold_affine_into_output(torch.ones(8, 24), None, affine)
    with pytest.raises(ValueError, match=r"b: got shape \[7\], wanted \[out=8\]"):
        fold_affine_into_input(torch.ones(8, 24), torch.ones(7), affine)
    with pytest.raises(ValueError, match=r"affine.shift: got shape \[23\]"):
        fold_affine_into_input(torch.ones(8, 24), None, Affine(torch.ones(24), torch.ones(23)))
    with pytest.raises(ValueError, match=r"scale: got shape \[7\], wanted \[out=8\]"):
        fold_output_scale(torch.ones(8, 24), None, torch.ones(7))
    with pytest.raises(ValueError, match=r"second.scale: got shape \[8\], wanted \[C=24\]"):
        compose(affine, Affine(torch.ones(8), torch.ones(8)))
    with pytest.raises(ValueError, match=r"w: got list, wanted a tensor of shape \[out, C\]"):
        fold_affine_into_input([[1.0]], None, affine)
    with pytest.raises(ValueError, match="dim: got None"):
        layernorm_affine(None, None)


# --- The way out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cast_returns_an_owned_contiguous_copy(dtype):
    x = Draw(11).normal(6, 8)
    y = cast(x[:, :3], dtype, "w_out")
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(y, x[:, :3].to(dtype))


def test_cast_keeps_none_and_empty():
    assert cast(None, torch.float32, "w_merged") is None
    assert cast(torch.empty(0, 8, dtype=torch.float64), torch.float16, "w_in").shape == (0, 8)


def test_cast_refuses_what_overflows():
    with pytest.raises(
        ValueError, match=r"w_merged: got \|value\| up to 70000, wanted at most 65504.*running_var.*bfloat16"
    ):
        cast(torch.tensor([1.0, -7e4], dtype=torch.float64), torch.float16, "w_merged")


def test_cast_refuses_what_was_not_finite():
    with pytest.raises(ValueError, match=r"bias: got 2 of 3 values not finite before the cast.*running_var"):
        cast(torch.tensor([1.0, float("inf"), float("nan")], dtype=torch.float64), torch.float32, "bias")


def test_cast_refuses_integers():
    with pytest.raises(ValueError, match=r"bias: got dtype torch.int8"):
        cast(torch.ones(3), torch.int8, "bias")


def test_a_variance_that_cancels_eps_is_refused():
    with pytest.raises(ValueError, match="running_var"):
        batchnorm_affine(None, None, torch.zeros(2), torch.tensor([1.0, -0.5]), eps=0.5)


@pytest.mark.parametrize("dim", [None, 3])
def test_layernorm_affine_of_a_bias_alone(dim):
    scale, shift = layernorm_affine(None, torch.arange(3.0), dim)
    assert torch.equal(scale, torch.ones(3).double())
    assert torch.equal(shift, torch.arange(3.0).double())


def test_layernorm_affine_of_no_channels():
    assert [t.shape for t in layernorm_affine(None, None, 0)] == [(0,), (0,)]
