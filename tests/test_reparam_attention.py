"""What the folds move out of attention changes nothing, padded windows included."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reparam_helpers import (
    EXACT,
    Draw,
    affine_of,
    apply_norm,
    attention,
    core,
    relative_error,
    softmax_attention,
    split_heads,
)

from repavit_ops.reparam import (
    Affine,
    attention_weights,
    cast,
    drop_k_bias,
    fold_attention_output_scale,
    fold_inner_affine,
    fold_input_affine,
    fold_output_affine,
    fold_scale,
    merge_attention_bypass,
    move_v_bias,
    pad_kv_vector,
    repbn_affine,
)

C, T, HEADS, D_QK, D_V = 24, 11, 3, 8, 8


def random_weights(draw, dim=C, num_heads=HEADS, d_qk=D_QK, d_v=D_V, biases=True, scale=None):
    rows = num_heads * (2 * d_qk + d_v)
    b_qkv, b_proj = (draw.normal(rows), draw.normal(dim)) if biases else (None, None)
    w_qkv, w_proj = draw.weight(rows, dim), draw.weight(dim, num_heads * d_v)
    return attention_weights(w_qkv, b_qkv, w_proj, b_proj, num_heads, d_qk, scale)


def shift_mask(draw, num_heads=HEADS):
    """A relative bias plus Swin's -100 between two groups of tokens."""
    group = torch.arange(T) % 2
    return draw.normal(num_heads, T, T) - 100.0 * (group[:, None] != group[None, :])


@settings(max_examples=60, deadline=None)
@given(
    num_heads=st.integers(1, 4),
    d_qk=st.integers(1, 9),
    d_v=st.integers(1, 9),
    biases=st.booleans(),
    norm=st.sampled_from(["batchnorm", "layernorm"]),
    seed=st.integers(0, 2**31),
)
def test_all_folds_together_are_exact(num_heads, d_qk, d_v, biases, norm, seed):
    draw = Draw(seed)
    weights = random_weights(draw, 12, num_heads, d_qk, d_v, biases)
    n = getattr(draw, norm)(12)
    x, mask, layerscale = draw.normal(2, T, 12), shift_mask(draw, num_heads), draw.uniform(12, low=0.05, high=1)
    wanted = attention(apply_norm(n, x), weights, mask) * layerscale
    folded = fold_attention_output_scale(fold_input_affine(weights, affine_of(n)), layerscale)
    folded = fold_scale(move_v_bias(drop_k_bias(folded)))
    inside = x if norm == "batchnorm" else core(x, n.eps)
    assert relative_error(attention(inside, folded, mask), wanted) <= EXACT
    assert folded.scale == 1.0
    assert folded.b_qkv.shape == weights.b_qkv.shape
    assert not folded.b_qkv[num_heads * d_qk :].any()


@pytest.mark.parametrize("low", [0.3, 1e-10], ids=["usual", "tiny_var"])
def test_repbn_before_qkv_leaves_no_norm(low):
    draw = Draw(1)
    weights, norm, x = random_weights(draw), draw.batchnorm(C, low, 2 * low), draw.normal(2, T, C)
    folded = fold_input_affine(weights, repbn_affine(affine_of(norm), 0.7))
    # Scores of a tiny variance are huge and make softmax a hard maximum; the inputs keep them within float64's grasp.
    x = x * min(1.0, low**0.5)
    assert relative_error(attention(x, folded), attention(apply_norm(norm, x) + 0.7 * x, weights)) <= EXACT


def test_k_bias_changes_no_softmax_row():
    draw = Draw(2)
    weights, x, mask = random_weights(draw), draw.normal(2, T, C), shift_mask(draw)
    dropped = drop_k_bias(weights)
    assert relative_error(attention(x, dropped, mask), attention(x, weights, mask)) <= EXACT
    assert not torch.equal(dropped.b_qkv, weights.b_qkv)
    q_dropped = weights._replace(b_qkv=weights.b_qkv.index_fill(0, torch.arange(HEADS * D_QK), 0.0))
    assert relative_error(attention(x, q_dropped, mask), attention(x, weights, mask)) > 0.01  # the Q bias must stay


def test_v_bias_moves_behind_the_softmax():
    draw = Draw(3)
    weights, x, mask = random_weights(draw, d_v=5), draw.normal(2, T, C), shift_mask(draw)
    moved = move_v_bias(weights)
    assert relative_error(attention(x, moved, mask), attention(x, weights, mask)) <= EXACT
    assert relative_error(attention(x, moved._replace(b_proj=weights.b_proj), mask), attention(x, weights, mask)) > 0.1


def test_a_norm_in_front_of_the_projection_folds_and_lets_no_v_bias_pass():
    draw = Draw(13)
    weights, norm, x = random_weights(draw, d_v=5), draw.layernorm(HEADS * 5), draw.normal(2, T, C)

    def heads(of):
        return attention(x, of._replace(w_proj=torch.eye(HEADS * 5, dtype=torch.float64), b_proj=None))

    def normed(of):
        return F.linear(core(heads(of), norm.eps), of.w_proj, of.b_proj)

    wanted = F.linear(norm(heads(weights)), weights.w_proj, weights.b_proj)
    folded = fold_inner_affine(weights, affine_of(norm))
    assert relative_error(normed(drop_k_bias(folded)), wanted) <= EXACT
    assert relative_error(normed(move_v_bias(folded)), wanted) > 0.01
    with pytest.raises(ValueError, match=rf"affine.scale: got shape \[{C + 1}\], wanted \[C={HEADS * 5}\]"):
        fold_inner_affine(weights, affine_of(draw.layernorm(C + 1)))


def test_folds_leave_their_input_alone():
    weights = random_weights(Draw(4))
    before = [t.clone() for t in weights[:4]]
    for fold in (drop_k_bias, move_v_bias, fold_scale):
        fold(weights)
    assert all(torch.equal(a, b) for a, b in zip(before, weights[:4], strict=True))


def test_scale_folds_into_the_queries():
    draw = Draw(5)
    weights, x = random_weights(draw, scale=0.37), draw.normal(2, T, C)
    folded = fold_scale(weights)
    assert folded.scale == 1.0
    assert relative_error(attention(x, folded), attention(x, weights)) <= EXACT
    assert torch.equal(fold_scale(folded).w_qkv, folded.w_qkv)


def test_batchnorm_behind_proj_folds():
    draw = Draw(6)
    weights, norm, x = random_weights(draw), draw.batchnorm(C), draw.normal(2, T, C)
    assert (
        relative_error(
            attention(x, fold_output_affine(weights, affine_of(norm))), apply_norm(norm, attention(x, weights))
        )
        <= EXACT
    )


def test_output_scale_scales_proj_bias():
    draw = Draw(7)
    weights, x = random_weights(draw), draw.normal(2, T, C)
    assert relative_error(attention(x, fold_attention_output_scale(weights, 0.5)), attention(x, weights) / 2) <= EXACT


# --- Bypass -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batchnorm", None])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_bypass_swallows_the_shortcut(norm, shortcut, fold):
    draw = Draw(8)
    weights, x, w, b = random_weights(draw), draw.normal(2, T, C), draw.weight(C, C), draw.normal(C)
    n = draw.batchnorm(C) if norm else None
    normed = apply_norm(n, x)
    wanted = attention(normed, weights) + F.linear(normed, w, b) + (x if shortcut else 0)
    folded = fold_input_affine(weights, affine_of(n)) if n else weights
    merged = merge_attention_bypass(folded, w, b, affine=affine_of(n), shortcut=shortcut, fold_identity=fold)
    got = attention(x, merged.weights) + x @ merged.w_merged.T + (x if merged.residual else 0)
    assert merged.residual is (shortcut and not fold)
    assert relative_error(got, wanted) <= EXACT


def test_bypass_under_layernorm_keeps_the_shortcut():
    draw = Draw(9)
    weights, norm, x, w = random_weights(draw), draw.layernorm(C), draw.normal(2, T, C), draw.weight(C, C)
    wanted = attention(norm(x), weights) + norm(x) @ w.T + x
    affine = affine_of(norm)
    merged = merge_attention_bypass(fold_input_affine(weights, affine), w, affine=affine, fold_identity=False)
    n = core(x, norm.eps)
    assert merged.residual
    assert relative_error(attention(n, merged.weights) + n @ merged.w_merged.T + x, wanted) <= EXACT


@pytest.mark.parametrize(("dim", "d_v"), [(C, 5), (C, 80)])
def test_bypass_by_its_defaults_beside_values_of_another_width(dim, d_v):
    """w_proj is not square, the shortcut goes into w_merged; 80 makes 288 rows, beyond Python's shared integers."""
    draw = Draw(11)
    weights, x = random_weights(draw, dim=dim, d_v=d_v), draw.normal(2, T, dim)
    w, b = draw.weight(dim, dim), draw.normal(dim)
    merged = merge_attention_bypass(weights, w, b_bypass=b)
    assert merged.residual is False
    got = attention(x, merged.weights) + x @ merged.w_merged.T
    assert relative_error(got, attention(x, weights) + F.linear(x, w, b) + x) <= EXACT


# --- Windows with padding ---------------------------------------------------------------------------------------------

WINDOW = 4


def to_windows(x):
    """[B, H, W, C], zero-padded at the right and bottom → [windows, WINDOW², C]."""
    _, height, width, dim = x.shape
    x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)
    return x.reshape(-1, WINDOW**2, dim)


def window_kv_attention(normed, weights, rel_bias, pad_kv=None):
    """Explicit window attention: padded tokens are zeros in ``normed``, or have ``pad_kv`` for key and value.

    Returns the rows of real tokens only, as a model crops the padding afterwards.
    """
    windows, real = to_windows(normed), to_windows(torch.ones_like(normed[..., :1]))
    qkv = F.linear(windows, weights.w_qkv, weights.b_qkv)
    q, kv = qkv[..., weights.q], qkv[..., weights.k.start :]
    if pad_kv is not None:
        kv = torch.where(real.bool(), kv, pad_kv)
    k, v = kv[..., : q.shape[-1]], kv[..., q.shape[-1] :]
    q, k, v = (split_heads(t, weights.num_heads) for t in (q, k, v))
    y = F.linear(softmax_attention(q, k, v, weights.scale, rel_bias), weights.w_proj, weights.b_proj)
    return y[real[..., 0].bool()]


def window_case(norm, d_v=D_V):
    draw = Draw(10)
    weights, rel_bias = random_weights(draw, d_v=d_v), draw.normal(HEADS, WINDOW**2, WINDOW**2)
    n, x = getattr(draw, norm)(C), draw.normal(2, 5, 7, C)
    inside = core(x, n.eps) if norm == "layernorm" else x
    return weights, affine_of(n), inside, rel_bias, window_kv_attention(apply_norm(n, x), weights, rel_bias)


FOLDS = {
    "affine": [],
    "k": [drop_k_bias],
    "v": [move_v_bias],
    "k_v_scale": [drop_k_bias, move_v_bias, fold_scale],
    "v_k_output": [move_v_bias, drop_k_bias, lambda w: fold_attention_output_scale(w, 1.0)],
}


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
@pytest.mark.parametrize("folds", FOLDS)
@pytest.mark.parametrize("d_v", [D_V, 5])
def test_padded_tokens_keep_their_key_and_value(norm, folds, d_v):
    weights, affine, inside, rel_bias, wanted = window_case(norm, d_v)
    folded = fold_input_affine(weights, affine)
    for fold in FOLDS[folds]:
        folded = fold(folded)
    pad_kv = pad_kv_vector(weights, affine, folded)
    assert pad_kv.shape == (HEADS * (D_QK + d_v),)
    assert relative_error(window_kv_attention(inside, folded, rel_bias, pad_kv), wanted) <= EXACT


def test_padded_tokens_under_any_other_vector_are_wrong():
    weights, affine, inside, rel_bias, wanted = window_case("layernorm")
    folded = fold_input_affine(weights, affine)
    moved = move_v_bias(drop_k_bias(folded))
    kv = slice(weights.k.start, None)
    wrong = {
        "folded bias": (folded, folded.b_qkv[kv]),
        "zeros after the moves": (moved, torch.zeros_like(folded.b_qkv[kv])),
        "unfolded bias after the moves": (moved, weights.b_qkv[kv]),
    }
    for name, (w, pad_kv) in wrong.items():
        assert relative_error(window_kv_attention(inside, w, rel_bias, pad_kv), wanted) > 0.01, name


# --- fp32 and refusals ------------------------------------------------------------------------------------------------


def test_fp32_after_one_cast():
    draw = Draw(11)
    weights, norm, x = random_weights(draw), draw.batchnorm(C), draw.normal(4, T, C).float().double()
    folded = fold_scale(move_v_bias(drop_k_bias(fold_input_affine(weights, affine_of(norm)))))
    single = folded._replace(**{f: cast(getattr(folded, f), torch.float32, f) for f in folded._fields[:4]})
    assert relative_error(attention(x.float(), single), attention(apply_norm(norm, x), weights)) <= 1e-5


def test_attention_weights_fill_what_is_left_out():
    w = attention_weights(torch.ones(3 * 24, 24), None, torch.ones(24, 24), None, 3)
    assert (w.d_qk, w.d_v, w.scale) == (8, 8, 8**-0.5)
    assert w.b_qkv.shape == (72,)
    assert not w.b_proj.any()
    assert attention_weights(torch.ones(3 * (2 * 4 + 8), 24), None, torch.ones(24, 24), None, 3).d_qk == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_qkv": torch.ones(72)}, r"w_qkv: got shape \[72\], wanted \[rows, C\]"),
        ({"w_qkv": torch.ones(70, C)}, r"w_qkv: got 70 rows, wanted 66 = 2·3 heads·7"),
        ({"d_qk": 4}, r"w_qkv: got 72 rows, wanted 48"),
        ({"num_heads": 5}, r"num_heads: got 5, wanted a divisor of the 24"),
        ({"num_heads": 0}, r"num_heads: got 0"),
        ({"b_qkv": torch.ones(24)}, r"b_qkv: got shape \[24\], wanted \[out=72\]"),
        ({"b_proj": torch.ones(72)}, r"b_proj: got shape \[72\], wanted \[out=24\]"),
        ({"w_proj": None}, r"w_proj: got NoneType, wanted a tensor of shape \[C_out, h_d_v\]"),
    ],
)
def test_attention_weights_refuse(change, message):
    arguments = {"w_qkv": torch.ones(72, C), "b_qkv": None, "w_proj": torch.ones(C, 24), "b_proj": None, "num_heads": 3}
    with pytest.raises(ValueError, match=message):
        attention_weights(**{**arguments, **change})


def test_folds_refuse_shapes():
    draw = Draw(12)
    weights, other = random_weights(draw), affine_of(draw.batchnorm(C + 1))
    for fold in (fold_input_affine, fold_output_affine):
        with pytest.raises(ValueError, match=r"affine.scale: got shape \[25\], wanted \[C=24\]"):
            fold(weights, other)
    with pytest.raises(ValueError, match=r"affine.scale: got shape \[25\]"):
        pad_kv_vector(weights, other, weights)
    with pytest.raises(ValueError, match=r"folded.w_qkv: got shape \[72, 12\], wanted \[rows=72, C=24\]"):
        pad_kv_vector(weights, affine_of(draw.batchnorm(C)), weights._replace(w_qkv=weights.w_qkv[:, :12]))
    with pytest.raises(ValueError, match=r"w_bypass: got shape \[24, 23\], wanted \[C_out=24, C=24\]"):
        merge_attention_bypass(weights, torch.ones(24, 23))
    with pytest.raises(ValueError, match=r"scale: got shape \[23\]"):
        fold_attention_output_scale(weights, torch.ones(23))


def test_the_width_of_a_value_head_is_read_from_the_columns_of_proj():
    weights = attention_weights(torch.zeros(2 * (4 + 4 + 3), 5), None, torch.zeros(10, 6), None, 2, 4)
    assert weights.d_v == 3


@pytest.mark.parametrize("d_qk", [None, 0])
def test_attention_without_keys_is_refused(d_qk):
    with pytest.raises(ValueError, match="w_qkv"):
        attention_weights(torch.zeros(4, 5), None, torch.zeros(5, 4), None, 2, d_qk)


def test_an_output_affine_has_as_many_channels_as_come_out():
    weights = attention_weights(torch.zeros(2 * (4 + 4 + 3), 5), None, torch.ones(10, 6), None, 2, 4)
    folded = fold_output_affine(weights, Affine(torch.full((10,), 2.0), torch.ones(10)))
    assert torch.equal(folded.w_proj, torch.full((10, 6), 2.0).double())
