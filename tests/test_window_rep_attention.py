"""The operator window_rep_attention: windows, shifts, padding and both roll orders, against Swin written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import DTYPES, cast, check_operator, randn, weight

from repavit_ops import ops, reference

SHAPES = {  # batch, height, width, C, heads, d, window, shift
    "swin_stage1": (1, 28, 28, 96, 3, 32, (7, 7), (0, 0)),
    "swin_shifted": (2, 14, 14, 96, 3, 32, (7, 7), (3, 3)),
    "swin_last_stage": (3, 7, 7, 64, 2, 32, (7, 7), (0, 0)),
    "window_4": (2, 8, 12, 24, 2, 12, (4, 4), (2, 2)),
    "padded": (2, 10, 13, 32, 2, 16, (4, 4), (2, 2)),
    "detection_like": (1, 25, 42, 32, 1, 32, (7, 7), (3, 3)),
    "map_within_window": (2, 3, 5, 16, 1, 16, (7, 7), (0, 0)),
    "rectangular": (1, 9, 20, 16, 2, 8, (3, 5), (1, 0)),
    "window_1": (1, 5, 4, 16, 1, 16, (1, 1), (0, 0)),
    "no_images": (0, 8, 8, 16, 1, 16, (4, 4), (2, 2)),
}


def operands(batch, height, width, c, heads, d, window, shift, seed=0):
    """Tensors (x, w_qkv, b_qkv, w_proj, b_proj, rel_bias, pad_kv) in float64 and the static arguments."""
    tokens = window[0] * window[1]
    tensors = (
        randn(batch, height, width, c, seed=seed),
        weight(3 * heads * d, c, seed + 1),
        randn(3 * heads * d, seed=seed + 2, scale=0.5),
        weight(c, heads * d, seed + 3),
        randn(c, seed=seed + 4, scale=0.5),
        randn(heads, tokens, tokens, seed=seed + 5),
        randn(2 * heads * d, seed=seed + 6),
    )
    return tensors, {"num_heads": heads, "scale": d**-0.5, "window": window, "shift": shift}


def op(*tensors, **static):
    """The functional operator with rel_bias and pad_kv positional, as the reference takes them."""
    *five, rel_bias, pad_kv = tensors
    return ops.window_rep_attention(*five, rel_bias=rel_bias, pad_kv=pad_kv, **static)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_truth_at_every_shape(shape, dtype):
    tensors, static = operands(*shape)
    check_operator(op, reference.window_rep_attention, tensors, dtype, norm_eps=1e-5, residual=True, **static)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pad", [False, True], ids=["pad_b_qkv", "pad_kv"])
@pytest.mark.parametrize("roll_first", [False, True], ids=["pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize("plain", [False, True], ids=["norm_residual", "plain"])
def test_every_option(dtype, pad, roll_first, plain):
    tensors, static = operands(*SHAPES["padded"])
    tensors = tensors if pad else (*tensors[:6], None)
    options = {} if plain else {"norm_eps": 1e-5, "residual": True}
    check_operator(op, reference.window_rep_attention, tensors, dtype, roll_first=roll_first, **options, **static)


def swin_by_hand(x, tensors, static, roll_first):
    """Swin's block up to the projection, token by token: every pair of tokens of a window, no roll, no partition."""
    (_, w_qkv, b_qkv, w_proj, b_proj, rel_bias, pad_kv), (wh, ww) = tensors, static["window"]
    (sh, sw), h = static["shift"], static["num_heads"]
    batch, height, width = x.shape[:3]
    d = w_proj.shape[1] // h
    big_h, big_w = -(-height // wh) * wh, -(-width // ww) * ww
    pad_row = torch.cat([torch.zeros(h * d, dtype=x.dtype), pad_kv])
    out = torch.zeros(batch, height, width, h * d, dtype=x.dtype)
    qkv = F.linear(x, w_qkv, b_qkv)

    def source(i, j):
        """Where the token at (i, j) of the rolled and padded map comes from; None for padding."""
        if roll_first:
            return ((i + sh) % height, (j + sw) % width) if i < height and j < width else None
        i, j = (i + sh) % big_h, (j + sw) % big_w
        return (i, j) if i < height and j < width else None

    def region(p, extent, w, s):
        return 0 if s == 0 else (p >= extent - w) + (p >= extent - s)

    for top in range(0, big_h, wh):
        for left in range(0, big_w, ww):
            places = [(top + i, left + j) for i in range(wh) for j in range(ww)]
            rows = [pad_row.expand(batch, -1) if (s := source(*p)) is None else qkv[:, s[0], s[1]] for p in places]
            ids = torch.tensor([3 * region(i, big_h, wh, sh) + region(j, big_w, ww, sw) for i, j in places])
            mask = (ids[:, None] != ids[None, :]).to(x.dtype) * -100
            q, k, v = torch.stack(rows, 1).view(batch, len(places), 3, h, d).permute(2, 0, 3, 1, 4)
            p = torch.softmax(q @ k.transpose(-1, -2) * static["scale"] + rel_bias + mask, -1)
            o = (p @ v).transpose(1, 2).reshape(batch, len(places), h * d)
            for n, place in enumerate(places):
                if (s := source(*place)) is not None:
                    out[:, s[0], s[1]] = o[:, n]
    return F.linear(out, w_proj, b_proj)


@pytest.mark.parametrize("roll_first", [False, True], ids=["pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize("name", ["window_4", "padded", "rectangular"])
def test_equals_swin_by_hand(name, roll_first):
    tensors, static = operands(*SHAPES[name])
    expected = swin_by_hand(tensors[0], tensors, static, roll_first)
    torch.testing.assert_close(op(*tensors, roll_first=roll_first, **static), expected)


def test_padding_defaults_to_the_projection_of_a_zero_row():
    tensors, static = operands(*SHAPES["padded"])
    explicit = (*tensors[:6], tensors[2][32:])
    torch.testing.assert_close(op(*tensors[:6], None, **static), op(*explicit, **static))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_input_gives_the_same_bits_alone_or_in_a_batch(dtype):
    tensors, static = operands(*SHAPES["swin_shifted"])
    x, *rest = cast(tensors, dtype)
    together = op(x, *rest, **static)
    assert torch.equal(together, op(x, *rest, **static))
    swapped = torch.cat([x[:1], cast((randn(1, 14, 14, 96, seed=8),), dtype)[0]])
    assert torch.equal(op(swapped, *rest, **static)[0], together[0])


BAD = {
    "x_shape": (lambda t, s: ((t[0][0], *t[1:]), s), "x: got shape"),
    "rel_bias": (lambda t, s: ((*t[:5], t[5][:, :-1], t[6]), s), "rel_bias: got shape"),
    "pad_kv": (lambda t, s: ((*t[:6], t[6][:-1]), s), "pad_kv: got shape"),
    "shift": (lambda t, s: (t, {**s, "shift": 4}), "shift: got"),
    "window": (lambda t, s: (t, {**s, "window": (4, 4, 4)}), "window: got"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(spoil, message):
    tensors, static = spoil(*operands(*SHAPES["window_4"]))
    with pytest.raises(ValueError, match=message):
        op(*tensors, **static)
