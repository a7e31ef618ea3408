"""The RePaViT merge equals the unmerged channel-idle FFN, whatever its norms, scale, biases and idle ratio."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reparam_helpers import EXACT, Draw, affine_of, apply_norm, core, merged_ffn, partial_gelu, relative_error

from repavit_ops.reparam import (
    active_channels,
    cast,
    fold_identity,
    is_identity,
    merge_channel_idle_ffn,
    merge_ffn_bypass,
    merging_adds_work,
    unfold_identity,
)


class ChannelIdleFFN:
    """The training form in eval mode: norm1 → fc1 → GELU on the first m → norm2 → fc2 → scale (+ x)."""

    def __init__(self, draw, dim, hidden, m, *, biases=True, norms=True, scale=None, shortcut=True, low=0.3):
        self.m, self.scale, self.shortcut = m, scale, shortcut
        self.w1, self.w2 = draw.weight(hidden, dim), draw.weight(dim, hidden)
        self.b1, self.b2 = (draw.normal(hidden), draw.normal(dim)) if biases else (None, None)
        self.norm1 = draw.batchnorm(dim, low, 2 * low) if norms else None
        self.norm2 = draw.batchnorm(hidden, low, 2 * low) if norms else None

    def __call__(self, x):
        h = F.linear(apply_norm(self.norm1, x), self.w1, self.b1)
        y = F.linear(apply_norm(self.norm2, partial_gelu(h, self.m)), self.w2, self.b2)
        y = y if self.scale is None else y * self.scale
        return y + x if self.shortcut else y

    def merge(self, **options):
        return merge_channel_idle_ffn(
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            self.m,
            input_affine=affine_of(self.norm1),
            hidden_affine=affine_of(self.norm2),
            output_scale=self.scale,
            **{"shortcut": self.shortcut, **options},
        )


@st.composite
def channel_idle_ffns(draw_from):
    dim = draw_from(st.integers(1, 13))
    hidden = draw_from(st.integers(1, 37))
    m = draw_from(st.one_of(st.just(0), st.just(hidden), st.integers(0, hidden)))
    draw = Draw(draw_from(st.integers(0, 2**31)))
    scale = draw_from(st.sampled_from(["none", "number", "layerscale"]))
    return draw, ChannelIdleFFN(
        draw,
        dim,
        hidden,
        m,
        biases=draw_from(st.booleans()),
        norms=draw_from(st.booleans()),
        scale={"none": None, "number": 0.5, "layerscale": draw.uniform(dim, low=0.05, high=1)}[scale],
        shortcut=draw_from(st.booleans()),
        low=draw_from(st.sampled_from([0.3, 1e-10])),
    )


@settings(max_examples=120, deadline=None)
@given(channel_idle_ffns(), st.booleans())
def test_merge_is_exact_with_random_statistics(case, fold):
    draw, ffn = case
    x = draw.normal(2, 7, ffn.w1.shape[1])
    assert relative_error(merged_ffn(x, ffn.merge(fold_identity=fold)), ffn(x)) <= EXACT


@pytest.mark.parametrize("theta", [0, 0.25, 0.5, 0.75, 1])
def test_merge_shapes_and_parameter_count(theta):
    dim, hidden = 24, 96
    m = active_channels(hidden, theta)
    merged = ChannelIdleFFN(Draw(1), dim, hidden, m).merge()
    assert merged.w_in.shape == (m, dim)
    assert merged.b_in.shape == (m,)
    assert merged.w_out.shape == (dim, m)
    assert merged.bias.shape == (dim,)
    assert {t.dtype for t in merged if isinstance(t, torch.Tensor)} == {torch.float64}
    if theta == 0:
        assert merged.w_merged is None
        assert merged.residual
    else:
        assert merged.w_merged.shape == (dim, dim)
        assert not merged.residual
        assert sum(t.numel() for t in merged[:5]) == dim**2 + dim + 2 * m * dim + m


def test_m_zero_is_linear():
    draw = Draw(2)
    ffn = ChannelIdleFFN(draw, 24, 96, 0)
    merged, x = ffn.merge(), draw.normal(7, 24)
    assert merged.w_in.numel() == merged.b_in.numel() == merged.w_out.numel() == 0
    assert relative_error(F.linear(x, merged.w_merged, merged.bias), ffn(x)) <= EXACT


@pytest.mark.parametrize("shortcut", [True, False])
def test_m_hidden_is_the_plain_ffn(shortcut):
    merged = ChannelIdleFFN(Draw(3), 24, 96, 96, shortcut=shortcut).merge()
    assert merged.w_merged is None
    assert merged.residual is shortcut


def test_the_first_channels_are_the_active_ones():
    draw = Draw(4)
    ffn = ChannelIdleFFN(draw, 24, 96, 24)
    x = draw.normal(7, 24)
    wanted = ffn(x)
    active = torch.randperm(24, generator=draw.generator)
    idle = 24 + torch.randperm(72, generator=draw.generator)
    order = torch.cat([active, idle])  # permuting inside the two groups changes nothing
    ffn.w1, ffn.b1, ffn.w2 = ffn.w1[order], ffn.b1[order], ffn.w2[:, order]
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(ffn.norm2, name).copy_(getattr(ffn.norm2, name)[order])
    assert relative_error(merged_ffn(x, ffn.merge()), wanted) <= EXACT
    ffn.w1, ffn.b1 = ffn.w1.flip(0), ffn.b1.flip(0)  # across them it does
    assert relative_error(merged_ffn(x, ffn.merge()), wanted) > 0.1


def test_explicit_shortcut_differs_by_exactly_the_identity():
    ffn = ChannelIdleFFN(Draw(5), 24, 96, 24)
    folded, explicit = ffn.merge(), ffn.merge(fold_identity=False)
    assert (folded.residual, explicit.residual) == (False, True)
    assert torch.equal(folded.w_merged, fold_identity(explicit.w_merged))
    assert relative_error(unfold_identity(folded.w_merged), explicit.w_merged) <= EXACT


def test_layerscale_scales_the_bias_and_not_the_shortcut():
    draw = Draw(6)
    ffn = ChannelIdleFFN(draw, 24, 96, 24, scale=draw.uniform(24, low=0, high=1))
    x, merged = draw.normal(7, 24), ffn.merge()
    wanted = ffn(x)
    assert relative_error(merged_ffn(x, merged), wanted) <= EXACT
    unscaled = merged.bias / ffn.scale  # a published implementation forgets it
    assert relative_error(merged_ffn(x, merged._replace(bias=unscaled)), wanted) > 0.1
    scaled_shortcut = (ffn.scale - 1).diag()
    assert relative_error(merged_ffn(x, merge_ffn_bypass(merged, scaled_shortcut)), wanted) > 0.1


def test_kept_layernorm_folds_its_affine_and_leaves_the_shortcut():
    draw = Draw(7)
    ffn = ChannelIdleFFN(draw, 24, 96, 24)
    ffn.norm1 = draw.layernorm(24)
    merged, x = ffn.merge(fold_identity=False), draw.normal(7, 24)
    branch = merged_ffn(core(x, ffn.norm1.eps), merged._replace(residual=False))
    assert merged.residual
    assert relative_error(branch + x, ffn(x)) <= EXACT


@pytest.mark.parametrize("m", [0, 24, 96])
@pytest.mark.parametrize("with_bias", [True, False])
def test_bypass_merges(m, with_bias):
    draw = Draw(8)
    ffn = ChannelIdleFFN(draw, 24, 96, m)
    x, w, b = draw.normal(7, 24), draw.weight(24, 24), draw.normal(24) if with_bias else None
    assert relative_error(merged_ffn(x, merge_ffn_bypass(ffn.merge(), w, b)), ffn(x) + F.linear(x, w, b)) <= EXACT


@pytest.mark.parametrize("m", [0, 48, 192])
@pytest.mark.parametrize("fold", [True, False])
def test_fp32_after_one_cast(m, fold):
    draw = Draw(9)
    ffn = ChannelIdleFFN(draw, 48, 192, m)
    x, merged = draw.normal(64, 48).float().double(), ffn.merge(fold_identity=fold)
    single = merged._replace(**{f: cast(getattr(merged, f), torch.float32, f) for f in merged._fields[:5]})
    assert relative_error(merged_ffn(x.float(), single), ffn(x)) <= 1e-5


def test_low_precision_inputs_are_widened_before_the_fold():
    draw = Draw(10)
    half = [t.to(torch.bfloat16) for t in (draw.weight(96, 24), draw.normal(96), draw.weight(24, 96), draw.normal(24))]
    from_half = merge_channel_idle_ffn(*half, 24)
    from_double = merge_channel_idle_ffn(*(t.double() for t in half), 24)
    assert all(torch.equal(a, b) for a, b in zip(from_half[:5], from_double[:5], strict=True))


def test_merge_is_differentiable():
    draw = Draw(11)
    tensors = [draw.weight(6, 3), draw.normal(6), draw.weight(3, 6), draw.normal(3)]
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: merge_channel_idle_ffn(*t, 2)[:5], tensors)


def test_is_identity_is_exact():
    assert is_identity(torch.eye(5, dtype=torch.float16))
    assert is_identity(torch.eye(0))
    assert not is_identity(torch.eye(5, 6))
    assert not is_identity(torch.ones(5))
    almost = torch.eye(5, dtype=torch.float64)
    almost[3, 3] += torch.finfo(torch.float64).eps
    assert not is_identity(almost)


# --- Counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "theta", "m"),
    [
        (768, 0.75, 192),
        (1536, 0, 1536),
        (1536, 1, 0),
        (1152, 2 / 3, 385),  # 384.00000000000006: the authors' float ceil
        (10, 0.25, 8),
        (0, 0.5, 0),
    ],
)
def test_active_channels_as_the_authors_count(hidden, theta, m):
    assert active_channels(hidden, theta) == m


@pytest.mark.parametrize("theta", [-0.1, 1.01, math.nan])
def test_active_channels_refuses(theta):
    with pytest.raises(ValueError, match="idle_ratio: got"):
        active_channels(96, theta)
    with pytest.raises(ValueError, match="hidden: got -1, wanted a number of channels"):
        active_channels(-1, 0.5)


@pytest.mark.parametrize(("idle", "adds"), [(0, False), (1, True), (12, True), (13, False), (96, False)])
def test_merging_saves_only_above_half_c(idle, adds):
    assert merging_adds_work(96, 96 - idle, dim=24) is adds


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [-1, 97, 24.0, None])
def test_merge_refuses_act_channels(m):
    ffn = ChannelIdleFFN(Draw(12), 24, 96, m)
    with pytest.raises(ValueError, match=r"act_channels: got .*, wanted an integer in 0\.\.96"):
        ffn.merge()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": torch.ones(24)}, r"w1: got shape \[24\], wanted \[hidden, C\]"),
        ({"b1": torch.ones(95)}, r"b1: got shape \[95\], wanted \[out=96\]"),
        ({"w2": torch.ones(24, 95)}, r"w2: got shape \[24, 95\], wanted \[C=24, hidden=96\]"),
        ({"b2": torch.ones(23)}, r"b2: got shape \[23\], wanted \[out=24\]"),
        ({"norm1": Draw(0).batchnorm(96)}, r"input_affine.scale: got shape \[96\], wanted \[C=24\]"),
        ({"norm2": Draw(0).batchnorm(24)}, r"hidden_affine.scale: got shape \[24\], wanted \[C=96\]"),
        ({"scale": torch.ones(96)}, r"scale: got shape \[96\], wanted \[out=24\]"),
    ],
)
def test_merge_refuses_shapes(change, message):
    ffn = ChannelIdleFFN(Draw(13), 24, 96, 24)
    vars(ffn).update(change)
    with pytest.raises(ValueError, match=message):
        ffn.merge()


def test_bypass_and_identity_refuse_shapes():
    merged = ChannelIdleFFN(Draw(14), 24, 96, 24).merge()
    with pytest.raises(ValueError, match=r"w_bypass: got shape \[24, 25\], wanted \[C_out=24, C=24\]"):
        merge_ffn_bypass(merged, torch.ones(24, 25))
    with pytest.raises(ValueError, match=r"b_bypass: got shape \[5\]"):
        merge_ffn_bypass(merged, torch.ones(24, 24), torch.ones(5))
    with pytest.raises(ValueError, match=r"w_merged: got shape \[24, 25\]"):
        fold_identity(torch.ones(24, 25))


def test_a_merge_adds_its_input_unless_told_otherwise():
    draw = Draw(3)
    w1, w2, x = draw.weight(6, 4), draw.weight(4, 6), draw.normal(5, 4)
    merged = merge_channel_idle_ffn(w1, None, w2, None, 2)
    assert not merged.residual
    assert relative_error(merged_ffn(x, merged), partial_gelu(x @ w1.T, 2) @ w2.T + x) <= EXACT
    assert not type(merged)(*merged[:5]).residual


def test_the_plain_ffn_of_many_channels():
    """m and hidden are equal numbers, not one object."""
    merged = merge_channel_idle_ffn(torch.ones(1000, 2), None, torch.ones(2, 1000), None, int("1000"))
    assert merged.w_merged is None
