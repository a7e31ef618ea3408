"""Joined branches merge exactly where the paper says they can, and merging refuses or differs where they cannot."""

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
    merged_ffn,
    relative_error,
    softmax_attention,
    split_heads,
)

from repavit_ops.reparam import (
    Affine,
    AttentionBranch,
    FFNBranch,
    attention_weights,
    cast,
    join_attention_a,
    join_attention_b,
    join_ffn,
    widen_ffn,
    widen_heads,
)

C, HIDDEN, T, HEADS, B = 24, 96, 7, 3, 3


def mix(tensors, alpha, kappa):
    """The join of depth_join: each branch keeps (1-α) of its own and takes α κ of the sum."""
    return [(1 - alpha) * t + alpha * kappa * sum(tensors) for t in tensors]


def norms_for(draw, kind, count, dim):
    return [None if kind == "none" else getattr(draw, kind)(dim) for _ in range(count)]


def branch_eps(norm):
    return norm.eps if isinstance(norm, torch.nn.LayerNorm) else None


def merged_input(x, norm):
    """What the merged operator reads: the shared core under LayerNorm, x itself otherwise."""
    return x if branch_eps(norm) is None else core(x, norm.eps)


# --- FFN --------------------------------------------------------------------------------------------------------------


def ffn_case(seed, kind="layernorm", count=B, dim=C, hiddens=None, biases=True):
    draw = Draw(seed)
    norms = norms_for(draw, kind, count, dim)
    branches = []
    for norm, hidden in zip(norms, hiddens or [HIDDEN] * count, strict=True):
        b1, b2 = (draw.normal(hidden), draw.normal(dim)) if biases else (None, None)
        w1, w2 = draw.weight(hidden, dim), draw.weight(dim, hidden)
        branches.append(FFNBranch(w1, b1, w2, b2, affine_of(norm), branch_eps(norm)))
    return draw.normal(2, T, dim), norms, branches


def joined_ffn(x, norms, branches, alpha, kappa, m=None):
    """The training graph: active pre-activations joined, idle ones each in its own branch."""
    m = branches[0].w1.shape[0] if m is None else m
    h = [F.linear(apply_norm(n, x), b.w1, b.b1) for n, b in zip(norms, branches, strict=True)]
    active = mix([t[..., :m] for t in h], alpha, kappa)
    z = [torch.cat([F.gelu(a), t[..., m:]], dim=-1) for a, t in zip(active, h, strict=True)]
    return sum(F.linear(t, b.w2, b.b2) for t, b in zip(z, branches, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 4),
    dim=st.integers(1, 9),
    hiddens=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    kind=st.sampled_from(["layernorm", "batchnorm", "none"]),
    biases=st.booleans(),
    kappa=st.sampled_from([None, 1.0, 0.3]),
    alpha=st.sampled_from([0.0, 0.25, 0.9, 1.0]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_join_and_widen_are_exact(count, dim, hiddens, kind, biases, kappa, alpha, seed, data):
    hiddens = hiddens[:count]
    m = data.draw(st.integers(0, min(hiddens)), label="act_channels")
    x, norms, branches = ffn_case(seed, kind, count, dim, hiddens, biases)
    k, inside = 1 / count if kappa is None else kappa, merged_input(x, norms[0])
    joined = join_ffn(branches, kappa, act_channels=m)
    assert joined.w_in.shape == (m, dim)
    assert not joined.residual
    assert relative_error(merged_ffn(inside, joined), joined_ffn(x, norms, branches, 1.0, k, m)) <= EXACT
    wide = widen_ffn(branches, alpha, kappa, act_channels=m)
    assert wide.w_in.shape == (count * m, dim)
    assert relative_error(merged_ffn(inside, wide), joined_ffn(x, norms, branches, alpha, k, m)) <= EXACT


def test_join_without_idle_channels_is_one_plain_ffn():
    x, norms, branches = ffn_case(1)
    joined = join_ffn(branches)
    assert joined.w_merged is None
    assert joined.w_in.shape == (HIDDEN, C)
    wanted = joined_ffn(x, norms, branches, 1.0, 1 / B)
    assert relative_error(merged_ffn(merged_input(x, norms[0]), joined), wanted) <= EXACT


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 0.99])
def test_below_alpha_one_the_join_is_another_function(alpha):
    x, norms, branches = ffn_case(2)
    wanted = joined_ffn(x, norms, branches, alpha, 1.0)
    assert relative_error(merged_ffn(merged_input(x, norms[0]), join_ffn(branches, 1.0)), wanted) > 1e-4
    message = rf"alpha: got {alpha:g}, wanted exactly 1: .*raise the join schedule.*widen_ffn"
    with pytest.raises(ValueError, match=message):
        join_ffn(branches, 1.0, alpha=alpha)


def test_alpha_may_be_the_buffer_that_a_checkpoint_carries():
    x, norms, branches = ffn_case(3)
    assert torch.equal(join_ffn(branches, alpha=torch.tensor(1.0)).w_in, join_ffn(branches).w_in)
    wanted = joined_ffn(x, norms, branches, 0.5, 1 / B)
    wide = widen_ffn(branches, torch.tensor(0.5))
    assert relative_error(merged_ffn(merged_input(x, norms[0]), wide), wanted) <= EXACT
    with pytest.raises(ValueError, match=r"alpha: got 0\.999"):
        join_ffn(branches, alpha=torch.tensor(0.999))


def test_kappa_defaults_to_the_mean():
    _, _, branches = ffn_case(4)
    assert torch.equal(join_ffn(branches).w_in, join_ffn(branches, 1 / B).w_in)
    assert relative_error(join_ffn(branches, 1.0).w_in, B * join_ffn(branches).w_in) <= EXACT


def test_per_branch_affines_matter():
    x, norms, branches = ffn_case(5)
    wanted = joined_ffn(x, norms, branches, 1.0, 1.0)
    shared = [b._replace(affine=branches[0].affine) for b in branches]
    assert relative_error(merged_ffn(merged_input(x, norms[0]), join_ffn(shared, 1.0)), wanted) > 0.1


def test_joined_ffn_in_fp32():
    x, norms, branches = ffn_case(6)
    x, joined = x.float().double(), join_ffn(branches, act_channels=24)
    single = joined._replace(**{f: cast(getattr(joined, f), torch.float32, f) for f in joined._fields[:5]})
    wanted = joined_ffn(x, norms, branches, 1.0, 1 / B, 24)
    assert relative_error(merged_ffn(merged_input(x, norms[0]).float(), single), wanted) <= 1e-5


# --- Attention --------------------------------------------------------------------------------------------------------


def attention_case(seed, kind="layernorm", count=B, num_heads=HEADS, d_qk=8, d_v=8, dim=C, biases=True):
    draw = Draw(seed)
    norms = norms_for(draw, kind, count, dim)
    rows = num_heads * (2 * d_qk + d_v)
    branches = []
    for norm in norms:
        b_qkv, b_proj = (draw.normal(rows), draw.normal(dim)) if biases else (None, None)
        w_qkv, w_proj = draw.weight(rows, dim), draw.weight(dim, num_heads * d_v)
        branches.append(AttentionBranch(w_qkv, b_qkv, w_proj, b_proj, affine_of(norm), num_heads, branch_eps(norm)))
    return draw.normal(2, T, dim), norms, branches, draw.normal(num_heads, T, T)


def branch_qkv(x, norm, branch, d_qk):
    """q, k, v of one branch, as rows [..., T, h·d]."""
    qk = branch.num_heads * d_qk
    return F.linear(apply_norm(norm, x), branch.w_qkv, branch.b_qkv).split([qk, qk, branch.w_proj.shape[1]], dim=-1)


def joined_attention_a(x, norms, branches, alpha, kappa, d_qk=8, attn_bias=None):
    """Join A's training graph: q, k and v joined, then each branch its own softmax and Wo."""
    qkv = [branch_qkv(x, n, b, d_qk) for n, b in zip(norms, branches, strict=True)]
    q, k, v = (mix(list(t), alpha, kappa) for t in zip(*qkv, strict=True))
    out = 0
    for i, b in enumerate(branches):
        heads = (split_heads(t[i], b.num_heads) for t in (q, k, v))
        out = out + F.linear(softmax_attention(*heads, d_qk**-0.5, attn_bias), b.w_proj, b.b_proj)
    return out


def joined_attention_b(x, norms, branches, d_qk=8, attn_bias=None):
    """Join B's training graph: scores summed over branches before one softmax; each branch its own V and Wo."""
    heads = []
    for n, b in zip(norms, branches, strict=True):
        heads.append([split_heads(t, b.num_heads) for t in branch_qkv(x, n, b, d_qk)])
    scores = sum(q @ k.transpose(-1, -2) for q, k, _ in heads) * d_qk**-0.5
    p = (scores if attn_bias is None else scores + attn_bias).softmax(-1)
    return sum(
        F.linear((p @ v).transpose(-2, -3).flatten(-2), b.w_proj, b.b_proj)
        for (_, _, v), b in zip(heads, branches, strict=True)
    )


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 4),
    num_heads=st.integers(1, 3),
    d_qk=st.integers(1, 5),
    d_v=st.integers(1, 5),
    kind=st.sampled_from(["layernorm", "batchnorm", "none"]),
    biases=st.booleans(),
    kappa=st.sampled_from([None, 1.0]),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_attention_joins_are_exact(count, num_heads, d_qk, d_v, kind, biases, kappa, alpha, seed):
    x, norms, branches, bias = attention_case(seed, kind, count, num_heads, d_qk, d_v, 6, biases)
    k, inside = 1 / count if kappa is None else kappa, merged_input(x, norms[0])

    a = join_attention_a(branches, kappa)
    assert a.w_qkv.shape == branches[0].w_qkv.shape
    wanted = joined_attention_a(x, norms, branches, 1.0, k, d_qk, bias)
    assert relative_error(attention(inside, a, bias), wanted) <= EXACT

    b = join_attention_b(branches)
    assert (b.d_qk, b.d_v, b.num_heads, b.scale) == (count * d_qk, count * d_v, num_heads, d_qk**-0.5)
    assert relative_error(attention(inside, b, bias), joined_attention_b(x, norms, branches, d_qk, bias)) <= EXACT

    wide = widen_heads(branches, alpha, kappa)
    assert (wide.d_qk, wide.d_v, wide.num_heads) == (d_qk, d_v, count * num_heads)
    wanted = joined_attention_a(x, norms, branches, alpha, k, d_qk, bias)
    assert relative_error(attention(inside, wide, bias.repeat(count, 1, 1)), wanted) <= EXACT


def test_wrong_ways_to_join_scores_differ():
    x, norms, branches, _ = attention_case(10)
    inside = merged_input(x, norms[0])
    wanted = joined_attention_b(x, norms, branches)
    right = join_attention_b(branches)
    assert relative_error(attention(inside, right), wanted) <= EXACT
    assert relative_error(attention(inside, join_attention_a(branches, 1.0)), wanted) > 0.1  # summed weights
    assert relative_error(attention(inside, right._replace(scale=right.d_qk**-0.5)), wanted) > 0.01  # the new scale


def test_independent_branches_are_more_heads_and_nothing_smaller():
    x, norms, branches, _ = attention_case(11)
    inside = merged_input(x, norms[0])
    wanted = sum(
        attention(apply_norm(n, x), attention_weights(b.w_qkv, b.b_qkv, b.w_proj, b.b_proj, HEADS))
        for n, b in zip(norms, branches, strict=True)
    )
    assert relative_error(attention(inside, widen_heads(branches)), wanted) <= EXACT
    assert relative_error(attention(inside, join_attention_a(branches, 1.0)), wanted) > 0.1


@pytest.mark.parametrize("join", [join_attention_a, join_attention_b])
@pytest.mark.parametrize("alpha", [0.0, 0.99, torch.tensor(0.5)])
def test_attention_joins_refuse_alpha(join, alpha):
    *_, branches, _ = attention_case(12)
    with pytest.raises(ValueError, match=r"alpha: got 0.*wanted exactly 1: .*raise the join schedule.*widen_heads"):
        join(branches, alpha=alpha)


@pytest.mark.parametrize("scale", [None, 0.37])
def test_an_explicit_scale_survives(scale):
    *_, branches, _ = attention_case(13)
    branches = [b._replace(scale=scale) for b in branches]
    for join in (join_attention_a, join_attention_b, widen_heads):
        assert join(branches).scale == (8**-0.5 if scale is None else scale)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", [join_ffn, widen_ffn])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": torch.ones(95, C)}, r"branches\[1\].w1: got shape \[95, 24\], wanted \[hidden=96, C=24\]"),
        ({"w2": torch.ones(C, 95)}, r"branches\[1\].w2: got shape \[24, 95\], wanted \[C=24, hidden=96\]"),
        ({"b1": torch.ones(95)}, r"branches\[1\].b1: got shape \[95\], wanted \[out=96\]"),
        ({"b2": torch.ones(95)}, r"branches\[1\].b2: got shape \[95\], wanted \[out=24\]"),
        (
            {"norm_eps": 1e-5},
            r"branches\[1\].norm_eps: got 1e-05, wanted 1e-06 as in .*share one LayerNorm",
        ),
        ({"norm_eps": None}, r"branches\[1\].norm_eps: got None"),
        (
            {"affine": Affine(torch.ones(5), torch.ones(5))},
            r"branches\[1\].affine.scale: got shape \[5\], wanted \[C=24\]",
        ),
    ],
)
def test_unequal_ffn_branches_are_refused(join, change, message):
    _, _, branches = ffn_case(14)
    branches[1] = branches[1]._replace(**change)
    with pytest.raises(ValueError, match=message):
        join(branches)


@pytest.mark.parametrize("join", [join_attention_a, join_attention_b, widen_heads])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_qkv": torch.ones(72, 23)}, r"branches\[2\].w_qkv: got shape \[72, 23\], wanted \[rows=72, C=24\]"),
        ({"w_proj": torch.ones(24, 48)}, r"branches\[2\].w_proj: got shape \[24, 48\], wanted \[C_out=24, h_d_v=24\]"),
        ({"b_qkv": torch.ones(24)}, r"branches\[2\].b_qkv: got shape \[24\], wanted \[out=72\]"),
        ({"num_heads": 6}, r"branches\[2\].num_heads: got 6, wanted 3 as in branches\[0\]"),
        ({"scale": 0.5}, r"branches\[2\].scale: got 0.5, wanted 0.353553 as in branches\[0\]"),
        ({"norm_eps": 1e-5}, r"branches\[2\].norm_eps: got 1e-05, wanted 1e-06"),
        ({"affine": Affine(torch.ones(5), torch.ones(5))}, r"branches\[2\].affine.scale: got shape \[5\]"),
    ],
)
def test_unequal_attention_branches_are_refused(join, change, message):
    *_, branches, _ = attention_case(15)
    branches[2] = branches[2]._replace(**change)
    with pytest.raises(ValueError, match=message):
        join(branches)


def test_the_second_branch_is_held_against_the_first():
    *_, branches, _ = attention_case(15)
    branches[1] = branches[1]._replace(scale=0.5)
    with pytest.raises(ValueError, match=r"branches\[1\].scale: got 0.5, wanted 0.353553 as in branches\[0\]"):
        widen_heads(branches)
    branches[1] = branches[1]._replace(scale=None, norm_eps=float(str(branches[0].norm_eps)))  # equal, and another
    widen_heads(branches)


def test_branches_are_independent_unless_alpha_is_given():
    for widen, branches in ((widen_ffn, ffn_case(18)[2]), (widen_heads, attention_case(18)[-2])):
        for ours, theirs in zip(widen(branches)[:2], widen(branches, 0.0)[:2], strict=True):
            assert torch.equal(ours, theirs)


def test_no_branches_and_bad_coefficients_are_refused():
    for join in (join_ffn, widen_ffn, join_attention_a, join_attention_b, widen_heads):
        with pytest.raises(ValueError, match="branches: got none"):
            join([])
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha: got .*, wanted the join coefficient, in \[0, 1\]"):
            widen_ffn(ffn_case(16)[2], alpha)
    with pytest.raises(ValueError, match=r"act_channels: got 97, wanted an integer in 0\.\.96"):
        join_ffn(ffn_case(17)[2], act_channels=97)
