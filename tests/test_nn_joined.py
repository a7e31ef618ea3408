"""Joined branches equal the paper's formulas at every α, merge exactly at α = 1, and carry α wherever they go."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from reparam_helpers import EXACT
from reparam_helpers import relative_error as error_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repavit_ops.nn import FFN, Attention, JoinedBranchAttention, JoinedBranchFFN, PartialGELUFFN, set_join
from repavit_ops.nn.joined_branch_attention import BypassedAttention

C, HIDDEN, HEADS, N, T = 24, 60, 3, 2, 7
ALPHAS = [0.0, 0.3, 1.0]
SCALED = {"layer_scale": 0.5, "skip_lam": 2.0}

SHARED_OPTIONS = {
    "default": {},
    "sum": {"kappa": "sum"},
    "batchnorm": {"norm": "batchnorm"},
    "no_norm": {"norm": None},
    "large_eps": {"norm_eps": 0.1},
    "bypass": {"bypass": True},
    "bypass_batchnorm": {"bypass": True, "norm": "batchnorm", **SCALED},
    "bypass_no_norm": {"bypass": True, "norm": None},
    "no_residual": {"residual": False, "bypass": True, "norm": "batchnorm"},
    "scaled": SCALED,
    "one_branch": {"branches": 1},
    "four_branches": {"branches": 4, "kappa": "sum"},
}
FFN_OPTIONS = {
    **SHARED_OPTIONS,
    "tanh": {"approximate": "tanh"},
    "idle": {"idle_ratio": 0.75},
    "idle_batchnorm": {"idle_ratio": 0.75, "norm": "batchnorm", **SCALED},
    "idle_bypass": {"act_channels": 17, "bypass": True, **SCALED},
    "all_idle": {"act_channels": 0, "kappa": "sum"},
}
ATTENTION_OPTIONS = {
    f"{join}_{name}": {"join": join, **options}
    for join in "ab"
    for name, options in {
        **SHARED_OPTIONS,
        "no_qkv_bias": {"qkv_bias": False},
        "no_bias_at_all": {"qkv_bias": False, "norm": None},
    }.items()
}


def relative_error(got, wanted):
    return error_of(got.detach(), wanted.detach())


# --- The formulas, branch by branch -----------------------------------------------------------------------------------


def normed(m, x):
    """What each branch reads, and n(x) itself."""
    if isinstance(m.norm, nn.BatchNorm1d):
        z = F.batch_norm(
            x.flatten(0, -2), m.norm.running_mean.clone(), m.norm.running_var.clone(), None, None, m.training, 0.1,
            m.norm.eps,
        ).view_as(x)  # fmt: skip
    elif isinstance(m.norm, nn.LayerNorm):
        z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + m.norm.eps).sqrt()
    else:
        return [x] * m.branches, x
    return [z * m.norm_weight[b] + m.norm_bias[b] for b in range(m.branches)], z


def join(ts, alpha, kappa):
    return [(1 - alpha) * t + alpha * kappa * sum(ts) for t in ts]


def close(m, x, y, z, scaled):
    if m.bypass is not None:
        y = y + m.bypass(z)
    if scaled:
        y = m.ls * y / m.skip_lam
    return x + y if m.residual else y


def naive_ffn(m, x, alpha, options):
    inputs, z = normed(m, x)
    h = [u @ w.T + b for u, w, b in zip(inputs, m.fc1_weight, m.fc1_bias, strict=True)]
    kappa = 1.0 if options.get("kappa") == "sum" else 1 / m.branches
    y = 0
    for own, joined, w, b in zip(h, join(h, alpha, kappa), m.fc2_weight, m.fc2_bias, strict=True):
        active = F.gelu(joined[..., : m.act_channels], approximate=options.get("approximate", "none"))
        y = y + torch.cat((active, own[..., m.act_channels :]), -1) @ w.T + b
    return close(m, x, y, z, "layer_scale" in options)


def naive_attention(m, x, alpha, options, attn_bias=None):
    inputs, z = normed(m, x)
    biases = [torch.zeros(3 * C)] * m.branches if m.qkv_bias is None else m.qkv_bias
    kappa = 1.0 if options.get("kappa") == "sum" else 1 / m.branches
    qkv = [
        (u @ w.T + b).view(*x.shape[:2], 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        for u, w, b in zip(inputs, m.qkv_weight, biases, strict=True)
    ]
    if options["join"] == "a":
        qkv = join(qkv, alpha, kappa)
    scores = [q @ k.mT / (C // HEADS) ** 0.5 for q, k, _ in qkv]
    if options["join"] == "b":
        scores = join(scores, alpha, kappa)
    y = 0
    for s, (_, _, v), w, b in zip(scores, qkv, m.proj_weight, m.proj_bias, strict=True):
        p = (s if attn_bias is None else s + attn_bias).softmax(-1).nan_to_num()  # a masked row gives 0
        y = y + (p @ v).transpose(1, 2).flatten(2) @ w.T + b
    return close(m, x, y, z, "layer_scale" in options)


def randomised(m):
    """Random parameters and statistics, in float64."""
    m = m.double().eval()
    with torch.no_grad():
        for name, p in m.named_parameters():
            p.normal_(std=1.0 if p.dim() < 3 else p.shape[-1] ** -0.5)
            if name in ("norm_weight", "ls"):
                p.add_(1.0)
        if isinstance(m.norm, nn.BatchNorm1d):
            m.norm.running_mean.normal_()
            m.norm.running_var.uniform_(0.3, 2.0)
    return m


def make_ffn(name, **more):
    torch.manual_seed(sorted(FFN_OPTIONS).index(name))
    options = {"branches": 3, **FFN_OPTIONS[name], **more}
    return randomised(JoinedBranchFFN(C, HIDDEN, **options)), options


def make_attention(name, **more):
    torch.manual_seed(sorted(ATTENTION_OPTIONS).index(name))
    options = {"branches": 3, **ATTENTION_OPTIONS[name], **more}
    return randomised(JoinedBranchAttention(C, HEADS, **options)), options


def tokens(*shape):
    return torch.randn(*(shape or (N, T, C)), dtype=torch.float64) * 2 + 0.5


CASES = [
    *[pytest.param(make_ffn, naive_ffn, name, id=f"ffn-{name}") for name in FFN_OPTIONS],
    *[pytest.param(make_attention, naive_attention, name, id=f"attention-{name}") for name in ATTENTION_OPTIONS],
]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- Training form ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("make", "name"), [(make_ffn, "default"), (make_attention, "a_default")])
def test_joined_branches_run_at_one_branchs_width(make, name):
    x, work = tokens(N, 4096 // C, C), {}
    for branches in (1, 3):
        m, _ = make(name, branches=branches, norm=None)
        for alpha in (0.3, 1.0):
            set_join(m, alpha)
            work[branches, alpha] = flops(m, x)
    assert work[3, 1.0] == work[1, 1.0]
    assert work[3, 0.3] == 3 * work[1, 0.3]


def test_idle_channels_run_as_one_matrix():
    x = tokens(N, 4096 // C, C)
    m, _ = make_ffn("idle", norm=None)
    per_token = 2 * C * (2 * 3 * m.act_channels + C)
    once = 2 * 3 * (HIDDEN - m.act_channels) * C * C
    assert flops(m, x) == per_token * x.numel() // C + once


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


# --- Merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "naive", "name"), CASES)
def test_merged_equals_joined(make, naive, name):
    m, options = make(name)
    set_join(m, 1.0)
    state, x = copy.deepcopy(m.state_dict()), tokens()
    merged = m.fuse()
    assert relative_error(merged(x), m(x)) <= EXACT
    assert relative_error(merged(x), naive(m, x, 1.0, options)) <= EXACT
    assert all(p.dtype == torch.float64 and p.requires_grad and not p.is_meta for p in merged.parameters())
    with torch.no_grad():  # merged weights own their storage
        for p in merged.parameters():
            p.zero_()
    torch.testing.assert_close(m.state_dict(), state, rtol=0, atol=0)


def test_merged_ffn_is_one_branch_wide():
    for name, m in (("default", HIDDEN), ("idle", HIDDEN // 4), ("all_idle", 0)):
        module, _ = make_ffn(name)
        set_join(module, 1.0)
        merged = module.fuse()
        assert type(merged) is PartialGELUFFN
        assert (merged.w_in.shape, merged.w_out.shape, merged.backend) == ((m, C), (C, m), "reference")
        assert (merged.w_merged is None) == (name == "default")
        assert merged.norm_eps == 1e-6
        assert merged.residual  # under a LayerNorm the shortcut reads raw x


def test_merged_attention_is_plain():
    a, _ = make_attention("a_large_eps")
    b, _ = make_attention("b_sum")
    set_join(nn.ModuleList([a, b]), 1.0)
    a, b = a.fuse(), b.fuse()
    assert type(a) is type(b) is Attention
    assert (a.num_heads, a.d_qk, a.d_v, a.norm.eps, a.norm.weight) == (HEADS, 8, 8, 0.1, None)
    assert (b.num_heads, b.d_qk, b.d_v) == (HEADS, 24, 24)
    assert a.scale == b.scale == 8**-0.5  # join B keeps the old scale; κ = 1
    assert not any(module.training for module in (*a.modules(), *b.modules()))


def test_identity_is_folded_only_where_it_is_exact():
    """Into a linear path that reads x itself, in at least float32, or as asked."""
    for make, name, norm in [
        (make_ffn, "idle_batchnorm", "batchnorm"),
        (make_ffn, "bypass_no_norm", None),
        (make_attention, "a_bypass_batchnorm", "batchnorm"),
        (make_ffn, "idle_bypass", "layernorm"),
        (make_attention, "b_bypass", "layernorm"),
    ]:
        m, _ = make(name)
        set_join(m, 1.0)
        x = tokens()
        assert m.fuse().residual == (norm == "layernorm")
        assert m.fuse(fold_identity=True).residual == (norm == "layernorm")
        assert m.fuse(fold_identity=False).residual
        assert relative_error(m.fuse(fold_identity=False)(x), m(x)) <= EXACT
        assert m.bfloat16().fuse().residual
        assert next(m.fuse().parameters()).dtype == torch.bfloat16


def test_bypassed_attention_holds_a_plain_attention():
    m, _ = make_attention("a_bypass")
    set_join(m, 1.0)
    merged = m.fuse()
    assert type(merged) is BypassedAttention
    assert type(merged.attn) is Attention  # which fusing may replace: it has neither norm nor shortcut
    assert not merged.attn.residual
    assert isinstance(merged.attn.norm, nn.Identity)


def test_merging_draws_no_random_numbers():
    for m, _ in (make_ffn("idle"), make_attention("a_default")):
        set_join(m, 1.0)
        before = torch.get_rng_state()
        m.fuse()
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [lambda: make_ffn("default"), lambda: make_attention("a_default")])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9999999])
def test_merging_is_refused_below_one(make, alpha):
    m, _ = make()
    set_join(m, alpha)
    with pytest.raises(RuntimeError, match=rf"alpha is {alpha}, wanted exactly 1.*set_join\(model, 1\.0\) at the end"):
        m.fuse()


@pytest.mark.parametrize("make", [lambda: make_ffn("default"), lambda: make_attention("a_default")])
def test_merging_is_refused_in_training_mode(make):
    m, _ = make()
    set_join(m, 1.0)
    with pytest.raises(RuntimeError, match=r"in training mode.*call model\.eval\(\)"):
        m.train().fuse()


def test_merging_names_a_weight_that_is_not_finite():
    ffn, _ = make_ffn("default")
    attention, _ = make_attention("a_default")
    set_join(nn.ModuleList([ffn, attention]), 1.0)
    with torch.no_grad():
        ffn.fc1_weight[1, 2, 3] = attention.proj_weight[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"w_in: got .* not finite"):
        ffn.fuse()
    with pytest.raises(ValueError, match=r"w_proj: got .* not finite"):
        attention.fuse()


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


# --- α ----------------------------------------------------------------------------------------------------------------


def nested():
    ffn, _ = make_ffn("idle")
    attention, _ = make_attention("b_default")
    return nn.ModuleDict({"block": nn.Sequential(attention, ffn), "head": nn.Linear(C, 5), "last": make_ffn("sum")[0]})


def test_new_modules_start_apart():
    for m in (JoinedBranchFFN(C, HIDDEN, 2), JoinedBranchAttention(C, HEADS, 2)):
        assert (m.join, float(m.alpha)) == (0.0, 0.0)


def test_set_join_sets_every_joined_module():
    model = nested()
    assert set_join(model, 0.3) == 3
    assert [float(v) for k, v in model.state_dict().items() if k.endswith("alpha")] == [0.3] * 3
    assert [m.join for m in (*model["block"], model["last"])] == [0.3] * 3
    assert set_join(model["last"], torch.tensor(1.0)) == 1
    assert [m.join for m in (*model["block"], model["last"])] == [0.3, 0.3, 1.0]


@pytest.mark.parametrize("alpha", [-0.1, 1.0001, float("nan"), float("inf")])
def test_set_join_refuses_what_is_no_coefficient(alpha):
    model = nested()
    with pytest.raises(ValueError, match=r"alpha: got .*, wanted the join coefficient, in \[0, 1\]"):
        set_join(model, alpha)
    assert model["last"].join == 0


def test_set_join_refuses_a_model_without_joined_branches():
    with pytest.raises(ValueError, match="model: got Sequential without joined branches"):
        set_join(nn.Sequential(nn.Linear(2, 2)), 0.5)
    m, _ = make_ffn("default")
    set_join(m, 1.0)
    with pytest.raises(ValueError, match="model: got PartialGELUFFN"):
        set_join(m.fuse(), 1.0)


def same(a, b, x):
    return all(torch.equal(u(x), v(x)) for u, v in ((a["block"], b["block"]), (a["last"], b["last"])))


@pytest.mark.parametrize("assign", [False, True])
def test_alpha_travels_in_the_state_dict(assign):
    model, other, x = nested(), nested(), tokens()
    set_join(model, 0.3)
    assert not same(model, other, x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert other["last"]._alpha == 0.3  # at loading, not at the next eager call: compiled calls cannot look
    assert same(model, other, x)
    with pytest.raises(RuntimeError, match=r"alpha is 0\.3"):
        other["last"].fuse()


def test_alpha_travels_in_copies():
    model, x = nested(), tokens()
    set_join(model, 0.3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(model, other, x)
        set_join(other, 1.0)
        assert model["last"].join == 0.3
        assert not same(model, other, x)


def test_alpha_is_not_rounded_by_casts():
    m, _ = make_ffn("default")
    set_join(m, 0.999)
    assert (m.bfloat16().join, m.alpha.dtype, float(m.alpha)) == (0.999, torch.float64, 0.999)
    assert (m.half().join, m.float().join, m.fc1_weight.dtype) == (0.999, 0.999, torch.float32)
    x = torch.randn(2, C, dtype=torch.float32)
    assert m(x).dtype == torch.float32


def test_alpha_survives_the_meta_device():
    with torch.device("meta"):
        m = JoinedBranchFFN(C, HIDDEN, 2)
    set_join(m, 0.3)
    for unread in (m, copy.deepcopy(m)):  # a copy has yet to read its buffer, and meta holds no value
        assert unread(torch.empty(3, C, device="meta")).shape == (3, C)
        assert float(unread.to_empty(device="cpu").alpha) == 0.3
    with torch.device("meta"):
        m = JoinedBranchFFN(C, HIDDEN, 3)
    source, x = make_ffn("default")[0], tokens()
    set_join(source, 0.3)
    m.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(m.eval()(x), source(x))


def test_a_write_to_the_buffer_is_noticed():
    """As a moving average of parameters and buffers writes it."""
    model, x = nested(), tokens()
    average = copy.deepcopy(model)
    set_join(model, 0.3)
    with torch.no_grad():
        for a, b in zip(average.buffers(), model.buffers(), strict=True):
            a.copy_(b)
    assert same(average, model, x)
    model["last"].alpha.fill_(0.5)
    with pytest.raises(RuntimeError, match=r"alpha is 0\.5"):
        model["last"].fuse()


def test_modules_made_in_inference_mode_work():
    with torch.inference_mode():
        m = JoinedBranchFFN(C, HIDDEN, 2)
        set_join(m, 0.3)
        assert m(tokens()).shape == (N, T, C)
        assert m.join == 0.3


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
