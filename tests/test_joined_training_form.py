"""The training form of joined branches equals the paper's formulas at every α, in one wide layer."""

import pytest
import torch
from joined_helpers import (
    ALPHAS,
    CASES,
    HEADS,
    HIDDEN,
    C,
    N,
    T,
    make_attention,
    make_ffn,
    naive_attention,
    naive_ffn,
    relative_error,
    tokens,
)
from reparam_helpers import EXACT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repavit_ops.nn import (
    FFN,
    Attention,
    JoinedBranchAttention,
    JoinedBranchFFN,
    joined_branch_attention,
    joined_branch_ffn,
    set_join,
)

pytestmark = pytest.mark.usefixtures("float64_default")


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("make", "naive", "name"), CASES)
def test_forward_equals_the_formula(make, naive, name, alpha):
    m, options = make(name)
    set_join(m, alpha)
    x = tokens()
    assert relative_error(m(x), naive(m, x, alpha, options)) <= EXACT


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("make", "naive", "name"), CASES)
def test_gradients_reach_every_parameter_and_equal_the_formulas(make, naive, name, alpha):
    m, options = make(name)
    set_join(m, alpha)
    x, out = tokens().requires_grad_(), tokens()
    leaves = {"x": x, **dict(m.named_parameters())}
    got = torch.autograd.grad(m(x), leaves.values(), out)
    wanted = torch.autograd.grad(naive(m, x, alpha, options), leaves.values(), out)
    for key, g, w in zip(leaves, got, wanted, strict=True):
        assert w.abs().max() > 0, key
        assert relative_error(g, w) <= EXACT, key


@pytest.mark.parametrize(("make", "naive", "name"), [CASES[2], CASES[6]])
def test_batchnorm_trains_on_batch_statistics(make, naive, name):
    m, options = make(name)
    m.train()
    set_join(m, 0.3)
    x, before = tokens(), m.norm.running_mean.clone()
    wanted = naive(m, x, 0.3, options)
    assert relative_error(m(x), wanted) <= EXACT
    torch.testing.assert_close(m.norm.running_mean, 0.9 * before + 0.1 * x.mean((0, 1)))


def test_dropout_acts_on_activated_channels_and_the_sum_in_training_only():
    m, _ = make_ffn("idle", drop=1.0)
    widths = []
    m.drop.register_forward_hook(lambda _module, _args, out: widths.append(out.shape[-1]))
    x = tokens()
    assert not torch.equal(m(x), x)
    assert widths == [3 * m.act_channels, C]
    assert torch.equal(m.train()(x), x)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", ["a_default", "b_sum"])
@pytest.mark.parametrize("shape", [(T, T), (HEADS, T, T), (1, T, T), (N, HEADS, T, T), (N, 1, 1, T), (1, HEADS, 1, T)])
def test_attn_bias_is_the_same_for_every_branch(name, shape, alpha):
    m, options = make_attention(name)
    set_join(m, alpha)
    x, bias = tokens(), tokens(*shape)
    assert relative_error(m(x, bias), naive_attention(m, x, alpha, options, bias)) <= EXACT
    if alpha == 1:
        assert relative_error(m.fuse()(x, bias), m(x, bias)) <= EXACT


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", ["a_default", "b_default"])
def test_a_wholly_masked_row_gives_zero(name, alpha):
    m, options = make_attention(name)
    set_join(m, alpha)
    x, bias = tokens(), torch.zeros(T, T)
    bias[2] = -torch.inf
    bias[3, 1:] = -torch.inf
    y = m(x, bias)
    assert relative_error(y, naive_attention(m, x, alpha, options, bias)) <= EXACT
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_ffn_takes_any_leading_dimensions():
    m, options = make_ffn("idle")
    set_join(m, 0.3)
    for shape in [(C,), (5, C), (2, 3, 4, C)]:
        x = tokens(*shape)
        assert relative_error(m(x), naive_ffn(m, x, 0.3, options)) <= EXACT
    assert m(tokens(0, C)).shape == (0, C)


def flops(m, x):
    with FlopCounterMode(display=False) as counter:
        m(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("make", "name", "rows"), [(make_ffn, "default", HIDDEN), (make_attention, "a_default", 3 * C)]
)
def test_joined_branches_run_at_one_branchs_width(make, name, rows):
    x, work = tokens(N, 4096 // C, C), {}
    for branches in (1, 3):
        m, _ = make(name, branches=branches, norm=None)
        for alpha in (0.0, 0.3, 1.0):
            set_join(m, alpha)
            work[branches, alpha] = flops(m, x)
    assert work[3, 1.0] == work[1, 1.0]
    assert work[3, 0.0] == 3 * work[1, 0.0]
    assert work[3, 0.3] == work[3, 0.0] + 2 * 3 * 3 * rows * (C + 1)  # weights and biases are mixed, whatever x is


def test_idle_channels_run_as_one_matrix():
    x = tokens(N, 4096 // C, C)
    m, _ = make_ffn("idle", norm=None)
    per_token = 2 * C * (2 * 3 * m.act_channels + C)
    once = 2 * 3 * (HIDDEN - m.act_channels) * C * C
    assert flops(m, x) == per_token * x.numel() // C + once


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("shape", [None, (T, T), (5, HEADS, T, T), (1, HEADS, T, T), (5, 1, 1, T)])
def test_scores_are_joined_a_few_images_at_a_time(monkeypatch, shape, images):
    m, options = make_attention("b_sum")
    set_join(m, 0.3)
    monkeypatch.setattr(joined_branch_attention, "SCORES_IN_CACHE", images * 3 * HEADS * T * T)
    counts = []
    monkeypatch.setattr(m, "_attend", lambda qkv, bias: counts.append(len(qkv)) or type(m)._attend(m, qkv, bias))
    x, bias = tokens(5, T, C), None if shape is None else tokens(*shape)
    assert relative_error(m(x, bias), naive_attention(m, x, 0.3, options, bias)) <= EXACT
    assert max(counts) == images
    assert sum(counts) == 5


@pytest.mark.parametrize(("alpha", "width"), [(0.3, 3), (1.0, 1)])
@pytest.mark.parametrize("room", [4, 0])
def test_hidden_channels_are_computed_some_tokens_at_a_time(monkeypatch, alpha, width, room):
    m, options = make_ffn("idle_bypass")
    set_join(m, alpha)
    monkeypatch.setattr(joined_branch_ffn, "HIDDEN_IN_CACHE", room * width * m.act_channels)
    counts = []
    monkeypatch.setattr(m, "_activate", lambda z, *w: counts.append(len(z)) or type(m)._activate(m, z, *w))
    x = tokens().requires_grad_()
    y, wanted = m(x), naive_ffn(m, x, alpha, options)
    assert relative_error(y, wanted) <= EXACT
    assert max(counts) == max(1, room)
    assert sum(counts) == N * T
    inputs = [x, *m.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(t.sin().sum(), inputs) for t in (y, wanted)), strict=True):
        assert relative_error(ours, theirs) <= EXACT


def test_branches_are_mixed_in_float32_under_autocast():
    m = make_ffn("default")[0].float()
    set_join(m, 0.999)  # 1 - α is lost next to α κ in bfloat16
    w = torch.randn(3, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(m.mix(w), 0.001 * w.double() + 0.333 * w.double().sum(0)) < 1e-6


@pytest.mark.parametrize("name", ["a_default", "b_default"])
def test_one_compiled_graph_serves_a_rising_alpha(name):
    m, _ = make_attention(name)
    graphs = []
    compiled = torch.compile(m, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    x = tokens()
    for alpha in (0.0, 0.1, 0.2, 0.3, 0.6, 1.0):
        set_join(m, alpha)
        assert relative_error(compiled(x), m(x)) <= EXACT
    assert len(graphs) <= 4  # apart, joining (first as a constant), joined


@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_branch_is_the_vanilla_module(alpha):
    ffn, _ = make_ffn("one_branch")
    attention, _ = make_attention("b_one_branch")
    set_join(nn.ModuleList([ffn, attention]), alpha)
    plain_ffn = FFN(C, HIDDEN, norm_eps=1e-6).eval()
    plain = Attention(C, HEADS, norm=lambda dim: nn.LayerNorm(dim, eps=1e-6)).eval()
    for source, target in (
        (ffn, {"fc1": plain_ffn.fc1, "fc2": plain_ffn.fc2, "norm": plain_ffn.norm}),
        (attention, {"qkv": plain.qkv, "proj": plain.proj, "norm": plain.norm}),
    ):
        for name, layer in target.items():
            layer.weight = nn.Parameter(getattr(source, f"{name}_weight")[0])
            layer.bias = nn.Parameter(getattr(source, f"{name}_bias")[0])
    x = tokens()
    assert relative_error(ffn(x), plain_ffn(x)) <= EXACT
    assert relative_error(attention(x), plain(x)) <= EXACT


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda **o: JoinedBranchFFN(C, HIDDEN, **o), lambda **o: JoinedBranchAttention(C, HEADS, **o)]
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": 0}, "branches: got 0, wanted a number >= 1"),
        ({"kappa": "max"}, "kappa: got 'max', wanted 'mean'"),
        ({"norm": "rmsnorm"}, "norm: got 'rmsnorm', wanted 'layernorm', 'batchnorm' or None"),
        ({"drop_path": 1.0}, "drop_path: got 1.0"),
        ({"skip_lam": 0}, "skip_lam: got 0"),
    ],
)
def test_bad_shared_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"branches": 2, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: JoinedBranchFFN(C, HIDDEN, 2, act_channels=3, idle_ratio=0.5),
            "act_channels, idle_ratio: got 3 and 0.5",
        ),
        (lambda: JoinedBranchFFN(C, HIDDEN, 2, act_channels=61), "act_channels: got 61, wanted 0 <= m <= hidden = 60"),
        (lambda: JoinedBranchFFN(C, HIDDEN, 2, idle_ratio=1.5), "idle_ratio: got 1.5"),
        (lambda: JoinedBranchFFN(C, HIDDEN, 2, approximate="fast"), "approximate: got 'fast', wanted 'none'"),
        (lambda: JoinedBranchAttention(C, 5, 2), "num_heads: got 5 for dim 24, wanted a divisor of dim"),
        (lambda: JoinedBranchAttention(C, 0, 2), "num_heads: got 0"),
        (lambda: JoinedBranchAttention(C, HEADS, 2, join="c"), "join: got 'c', wanted 'a'"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
