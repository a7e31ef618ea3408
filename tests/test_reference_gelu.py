"""The definition's GELU: the formula's values for every float, on any machine and whatever the layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from repavit_ops import reference

NARROW = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (
    0.0,
    -0.0,
    1e-30,
    -1e-30,
    1e-40,
    6e4,
    -6e4,
    1.8e38,
    -1.8e38,
    3.3e38,
    float("inf"),
    -float("inf"),
    float("nan"),
)


def layouts(x):
    """The same numbers contiguous, strided, alone and many."""
    yield x
    yield torch.stack((x, x), dim=-1)[..., 0]
    yield x.expand(64, *x.shape).contiguous()[3]
    yield torch.cat([v.view(1) for v in x])


def formula(x, approximate):
    return x * torch.sigmoid(1.702 * x) if approximate == "quick" else F.gelu(x, approximate=approximate)


@pytest.mark.parametrize("approximate", ["none", "quick"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_special_values_are_those_of_float64(dtype, approximate):
    x = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    expected = formula(x.double(), approximate).to(dtype)
    for given in layouts(x):
        y = reference.gelu(given, approximate)
        assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.signbit() & ~y.isnan(), expected.signbit() & ~expected.isnan())


def test_float32_is_within_two_roundings():
    x = torch.linspace(-6, 6, 1 << 16)
    truth = F.gelu(x.double())
    for given in layouts(x):
        error = (reference.gelu(given).double() - truth).abs()
        assert (error <= 2.5 * 2**-24 * truth.abs() + 4e-8).all()


@pytest.mark.parametrize("approximate", ["none", "quick"])
@pytest.mark.parametrize("dtype", NARROW[1:], ids=str)
def test_16_bits_are_rounded_once(dtype, approximate):
    x = torch.linspace(-6, 6, 1 << 14).to(dtype)
    truth = formula(x.double(), approximate)
    error = (reference.gelu(x, approximate).double() - truth).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * 1.01 * truth.abs() + 1e-6).all()


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_derivatives_are_those_of_the_formula(approximate):
    x = torch.linspace(-6, 6, 1001).requires_grad_()
    wide = x.detach().double().requires_grad_()
    reference.gelu(x, approximate).sum().backward()
    formula(wide, approximate).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=2e-6)
