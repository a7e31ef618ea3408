"""Joined branches merge exactly at α = 1, on whatever weights training leaves, and not below."""

import copy

import pytest
import torch
import torch.nn.functional as F
from joined_helpers import (
    CASES,
    HEADS,
    HIDDEN,
    C,
    make_attention,
    make_ffn,
    relative_error,
    tokens,
    trained,
)
from model_helpers import randomise
from reparam_helpers import EXACT
from torch import nn

from repavit_ops import fuse, reparameterize
from repavit_ops.models import JoinedVisionTransformer
from repavit_ops.nn import Attention, PartialGELUFFN, set_join
from repavit_ops.nn.join import JoinedBranches
from repavit_ops.nn.joined_branch_attention import BypassedAttention

pytestmark = pytest.mark.usefixtures("float64_default")


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


@pytest.mark.parametrize(("make", "naive", "name"), CASES)
def test_merged_equals_joined_on_trained_weights(make, naive, name):
    m, options = make(name)
    before = copy.deepcopy(m.state_dict())
    trained(m)
    assert all((m.state_dict()[key] != value).any() for key, value in before.items()), "a weight was not trained"
    assert m.join == 1
    x, merged = tokens(), m.fuse()
    assert relative_error(merged(x), m(x)) <= EXACT
    assert relative_error(merged(x), naive(m, x, 1.0, options)) <= EXACT


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branches": 4, "kappa": "sum"},
        {"join": "b", "branches": 3},
        {"norm": "batchnorm", "idle_ratio": 0.75},
        {"norm": "batchnorm", "join": "b", "kappa": "sum", "bypass": True},
        {"norm": None, "bypass": True, "idle_ratio": [0.5, 1.0]},
        {"bypass": True, "idle_ratio": 0.25, "layer_scale": 0.1, "qkv_bias": False},
    ],
    ids=str,
)
def test_a_trained_model_merges_and_fuses_exactly(options):
    config = {"img_size": 16, "patch_size": 8, "embed_dim": C, "depth": 2, "num_heads": HEADS, "num_classes": 5}
    torch.manual_seed(0)
    model = JoinedVisionTransformer(**config, **{"branches": 2, **options}, join_steps=8)
    model = randomise(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 3, 16, 16)), torch.randint(5, (6,))).backward()
        optimizer.step()
    x = torch.randn(4, 3, 16, 16)
    merged = reparameterize(model.eval())
    assert not any(isinstance(module, JoinedBranches) for module in merged.modules())
    assert relative_error(merged(x), model(x)) <= EXACT
    assert relative_error(fuse(model, backend="reference")(x), model(x)) <= EXACT


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
        assert m.float().fuse().residual == (norm == "layernorm")
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
