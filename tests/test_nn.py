"""Training and deployed modules on their own: formulas, merging, parameters, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from model_helpers import Recorder, randomise, relative
from torch import nn

from repavit_ops import backends, reference
from repavit_ops.nn import (
    FFN,
    Attention,
    ChannelIdleFFN,
    DeployedShapeFFN,
    PartialGELUFFN,
    PatchProjection,
    RepAttention,
    RepBN,
    TokenBatchNorm,
    WindowAttention,
    WindowRepAttention,
)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channel_idle_by_hand(m: ChannelIdleFFN, x: torch.Tensor) -> torch.Tensor:
    """RePaViT, eq. 2, with a mask instead of slices and BatchNorm written out."""

    def bn(n, t):
        return (t - n.running_mean) / torch.sqrt(n.running_var + n.eps) * n.weight + n.bias

    h = F.linear(bn(m.norm1, x), m.fc1.weight, m.fc1.bias)
    active = torch.arange(m.hidden) < m.act_channels
    y = F.linear(bn(m.norm2, torch.where(active, F.gelu(h), h)), m.fc2.weight, m.fc2.bias)
    return y


IDLE = {
    "theta_0.75": {"idle_ratio": 0.75},
    "theta_1": {"idle_ratio": 1.0},
    "theta_0": {"idle_ratio": 0.0},
    "m_5": {"act_channels": 5},
    "no_shortcut": {"idle_ratio": 0.75, "residual": False},
    "layer_scale": {"idle_ratio": 0.75, "layer_scale": 0.3},
    "lvvit": {"idle_ratio": 2 / 3, "skip_lam": 2.0},
    "tanh": {"idle_ratio": 0.5, "approximate": "tanh"},
}


@pytest.mark.parametrize("config", IDLE.values(), ids=IDLE.keys())
def test_channel_idle_ffn_merges_exactly(config):
    module = randomise(ChannelIdleFFN(12, 48, **config)).double()
    merged, x = module.fuse(), tokens(2, 5, 12)
    assert relative(merged(x), module(x)) < 1e-10
    assert (merged.w_merged is None) == (module.act_channels == 48)
    c, m = 12, module.act_channels
    idle = c * c if m < 48 else 0
    assert sum(p.numel() for p in merged.parameters()) == idle + c + 2 * m * c + m


def test_channel_idle_ffn_is_equation_2():
    module, x = randomise(ChannelIdleFFN(12, 48, act_channels=7)).double(), tokens(2, 5, 12)
    assert relative(module(x), x + channel_idle_by_hand(module, x)) < 1e-12
    module.residual, module.skip_lam = True, 2.0
    assert relative(module(x), x + channel_idle_by_hand(module, x) / 2) < 1e-12


def test_tiny_variances_still_merge():
    module, x = randomise(ChannelIdleFFN(12, 48, idle_ratio=0.5)).double(), tokens(2, 5, 12) * 1e-4
    module.norm1.running_var.fill_(1e-9)
    assert relative(module.fuse()(x), module(x)) < 1e-10


def test_merging_keeps_the_shortcut_apart_in_low_precision_only():
    module = randomise(ChannelIdleFFN(12, 48, idle_ratio=0.75))
    assert not module.fuse().residual
    assert copy.deepcopy(module).bfloat16().fuse().residual
    assert module.fuse(fold_identity=False).residual


@pytest.mark.parametrize("batchnorm", [True, False], ids=["batchnorm", "no_norm"])
@pytest.mark.parametrize("config", [{}, {"layer_scale": 0.3}, {"skip_lam": 2.0}, {"residual": False}], ids=str)
def test_deployed_shape_ffn_folds_exactly(batchnorm, config):
    module, x = randomise(DeployedShapeFFN(12, 7, batchnorm=batchnorm, **config)).double(), tokens(2, 5, 12)
    assert relative(module.fuse()(x), module(x)) < 1e-10


def test_training_forms_refuse_to_merge_in_training():
    for module in (ChannelIdleFFN(8, 16, idle_ratio=0.5), DeployedShapeFFN(8, 4)):
        with pytest.raises(RuntimeError, match=r"training mode.*model\.eval\(\)"):
            module.fuse()


def test_batchnorm_statistics_cover_every_token():
    norm, x = TokenBatchNorm(6).double(), tokens(3, 5, 6)
    y = norm(x)
    assert y.mean((0, 1)).abs().max() < 1e-12
    torch.testing.assert_close(y.var((0, 1), unbiased=False), torch.ones(6).double(), rtol=1e-3, atol=0)
    rep = randomise(RepBN(6)).double()
    torch.testing.assert_close(rep(x), TokenBatchNorm.forward(rep, x) + rep.alpha * x)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    module = ChannelIdleFFN(8, 32, idle_ratio=0.5, drop_path=0.5).double()
    x = tokens(64, 3, 8)
    branch = module(x) - x
    dropped = branch.flatten(1).abs().sum(1) == 0
    assert 16 <= int(dropped.sum()) <= 48


def test_vanilla_ffn_and_attention_are_the_textbook_ones():
    x = tokens(2, 5, 12)
    ffn = randomise(FFN(12, 48)).double()
    torch.testing.assert_close(ffn(x), x + ffn.fc2(F.gelu(ffn.fc1(ffn.norm(x)))))
    attention = randomise(Attention(12, 3)).double()
    textbook = nn.MultiheadAttention(12, 3, batch_first=True).double()
    textbook.in_proj_weight.data, textbook.in_proj_bias.data = attention.qkv.weight.data, attention.qkv.bias.data
    textbook.out_proj.weight.data, textbook.out_proj.bias.data = attention.proj.weight.data, attention.proj.bias.data
    n = attention.norm(x)
    torch.testing.assert_close(attention(x), x + textbook(n, n, n, need_weights=False)[0])


def test_window_attention_gathers_its_table_as_swin_does():
    module = WindowAttention(8, 2, window=3)
    for i in range(9):
        for j in range(9):
            dy, dx = i // 3 - j // 3, i % 3 - j % 3
            expected = module.relative_position_bias_table[(dy + 2) * 5 + dx + 2]
            assert torch.equal(module.rel_bias()[:, i, j], expected)


def test_deployed_modules_compute_their_operators():
    x = tokens(2, 7, 16).float()
    ffn = PartialGELUFFN(16, 24, norm_eps=1e-6, residual=True)
    expected = reference.partial_gelu_ffn(
        x, ffn.w_in, ffn.b_in, ffn.w_out, ffn.w_merged, ffn.bias, norm_eps=1e-6, residual=True
    )
    torch.testing.assert_close(ffn(x), expected)
    attention = RepAttention(16, 2, d_qk=12, d_v=5, norm_eps=1e-6)
    expected = reference.rep_attention(
        x,
        attention.w_qkv,
        attention.b_qkv,
        attention.w_proj,
        attention.b_proj,
        num_heads=2,
        scale=12**-0.5,
        d_qk=12,
        norm_eps=1e-6,
    )
    torch.testing.assert_close(attention(x), expected)


def test_window_modules_follow_swins_rule_for_small_maps():
    adaptive = randomise(WindowRepAttention(8, 2, window=4, shift=2, padding=True))
    static = WindowRepAttention(8, 2, window=4, shift=2, padding=True, static_shift=True)
    static.load_state_dict(adaptive.state_dict())
    small, large = tokens(1, 4, 9, 8).float(), tokens(1, 8, 8, 8).float()
    assert not torch.allclose(adaptive(small), static(small))
    torch.testing.assert_close(adaptive(large), static(large))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ChannelIdleFFN(8, 32), "act_channels, idle_ratio: got None and None"),
        (lambda: ChannelIdleFFN(8, 32, act_channels=4, idle_ratio=0.5), "exactly one"),
        (lambda: ChannelIdleFFN(8, 32, act_channels=33), "act_channels: got 33"),
        (lambda: ChannelIdleFFN(8, 32, idle_ratio=1.5), "idle_ratio: got 1.5"),
        (lambda: ChannelIdleFFN(8, 32, idle_ratio=0.5, drop_path=1.0), "drop_path: got 1.0"),
        (lambda: FFN(8, 32, skip_lam=0.0), "skip_lam: got 0"),
        (lambda: Attention(10, 3), "num_heads: got 3 for dim 10"),
        (lambda: RepAttention(10, 3), "num_heads: got 3 for dim 10"),
        (lambda: PartialGELUFFN(8, -1), "dim, act_channels: got 8, -1"),
        (lambda: PartialGELUFFN(8, 4, approximate="erf"), "approximate: got 'erf'"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@torch.no_grad()
def test_float64_on_the_cpu_is_left_to_pytorch_unless_the_kernel_is_named():
    modules = {
        "partial_gelu_ffn": (PartialGELUFFN(24, 16), (2, 5, 24)),
        "rep_attention": (RepAttention(24, 3), (2, 5, 24)),
        "window_rep_attention": (WindowRepAttention(24, 3, 4), (2, 8, 8, 24)),
        "patch_projection": (PatchProjection(3, 24, 4), (2, 3, 8, 8)),
    }
    for operator, (module, shape) in modules.items():
        for dtype in (torch.float64, torch.float32):
            results = []
            for backend in ("auto", "cpp", "reference"):
                if backends.why_unavailable(backend) is not None:
                    continue
                module.backend = backend
                x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                with Recorder() as recorder:
                    results.append(module.to(dtype)(x))
                kernel = backend == "cpp" or (backend == "auto" and dtype == torch.float32)
                assert (f"repavit_ops::{operator}" in recorder.calls) == kernel, (operator, dtype, backend)
            for other in results[1:]:
                torch.testing.assert_close(other, results[0])
