"""nn.WindowRepAttention on its own: what it hands its operator, and the shift that a map of some size gets."""

from __future__ import annotations

import pytest
import torch
from model_helpers import randomise

from repavit_ops import ops
from repavit_ops.nn import WindowRepAttention
from repavit_ops.nn.window_rep_attention import effective_shift


def window_module(**options):
    return randomise(WindowRepAttention(12, 2, (2, 3), (1, 2), **options)).requires_grad_(False)


def by_the_operator(module, x, shift, roll_first=False):
    return ops.window_rep_attention(
        x,
        module.w_qkv,
        module.b_qkv,
        module.w_proj,
        module.b_proj,
        rel_bias=module.rel_bias,
        pad_kv=module.pad_kv,
        num_heads=2,
        scale=module.scale,
        window=(2, 3),
        shift=shift,
        norm_eps=None,
        residual=False,
        norm="layer",
        roll_first=roll_first,
        backend="reference",
    )


@pytest.mark.parametrize(
    ("size", "by_axis", "wanted"),
    [
        ((4, 6), False, (1, 2)),
        ((2, 6), False, (0, 0)),  # the smaller side is no larger than the smaller edge of the window
        ((1, 6), False, (0, 0)),
        ((4, 3), False, (1, 2)),
        ((3, 3), False, (1, 2)),
        ((4, 6), True, (1, 2)),
        ((2, 6), True, (0, 2)),
        ((1, 6), True, (0, 2)),
        ((4, 3), True, (1, 0)),
        ((2, 3), True, (0, 0)),
    ],
)
def test_the_shift_that_a_map_gets(size, by_axis, wanted):
    assert effective_shift(size, (2, 3), (1, 2), by_axis) == wanted
    if not by_axis:
        assert effective_shift(size, (2, 3), (1, 2)) == wanted


def test_what_is_made_of_the_arguments():
    module = window_module()
    assert (module.window, module.shift) == ((2, 3), (1, 2))
    assert module.rel_bias.shape == (2, 6, 6)
    assert module.pad_kv is None
    assert (module.static_shift, module.shift_by_axis, module.roll_first) == (False, False, False)
    assert window_module(padding=True).pad_kv.shape == (24,)
    square = WindowRepAttention(12, 2, 4, 2)
    assert (square.window, square.shift, square.rel_bias.shape) == ((4, 4), (2, 2), (2, 16, 16))
    assert WindowRepAttention(12, 2, 4).shift == (0, 0)
    with pytest.raises(TypeError):
        WindowRepAttention(12, 2, 4, 2, 6)  # options have names


def test_pickles_of_older_versions_shift_by_the_smaller_side():
    module, x = window_module(), torch.randn(2, 2, 6, 12)
    del module.shift_by_axis
    torch.testing.assert_close(module(x), by_the_operator(module, x, (0, 0)))


@pytest.mark.parametrize("padding", [False, True])
def test_a_call_is_the_operators(padding):
    module, x = window_module(padding=padding), torch.randn(2, 4, 6, 12)
    size = (3, 5) if padding else (4, 6)
    x = x[:, : size[0], : size[1]]
    torch.testing.assert_close(module(x), by_the_operator(module, x, (1, 2)))
    module.roll_first = True
    torch.testing.assert_close(module(x), by_the_operator(module, x, (1, 2), roll_first=True))


def test_a_shift_that_is_settled_once_or_for_one_call():
    module, x = window_module(), torch.randn(2, 2, 6, 12)
    shifted, plain = (by_the_operator(module, x, shift) for shift in ((1, 2), (0, 0)))
    assert not torch.allclose(shifted, plain)
    torch.testing.assert_close(module(x), plain)
    torch.testing.assert_close(module(x, True), shifted)
    module.static_shift = True
    torch.testing.assert_close(module(x), shifted)
    torch.testing.assert_close(module(x, False), plain)
    module.static_shift, module.shift_by_axis = False, True
    torch.testing.assert_close(module(x), by_the_operator(module, x, (0, 2)))
