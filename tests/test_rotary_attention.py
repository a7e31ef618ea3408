"""rep_attention with rotary embedding and QK-norm: every layout, table and dtype against the reference; the folds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import DTYPES, assert_follows_rule, randn, weight
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repavit_ops import backends, ops, reference, stack_plan
from repavit_ops.fusing.folding import AttentionParts, fold_attention
from repavit_ops.nn import RepAttention
from repavit_ops.stack.kept_plan import KeptPlan
from repavit_ops.stack_plan import Step

SHAPES = {  # B, T, C, heads, d_qk, d_v
    "vit": (2, 50, 48, 3, 16, 16),
    "dinov3": (1, 197, 128, 2, 64, 64),
    "odd_half": (2, 17, 12, 2, 6, 4),
    "one_token": (3, 1, 8, 2, 4, 4),
    "tails": (2, 9, 20, 1, 20, 8),
}
NORMS = {"none": None, "layer": 1e-6, "rms": 1e-5}
LAYOUTS = ("half", "interleaved")


def operands(b, t, c, h, d_qk, d_v, prefix=0, width=None, per="all", norm=None, seed=0):
    """The tensors of rep_attention in float64, tables for all but ``prefix`` tokens."""
    tensors = {
        "x": randn(b, t, c, seed=seed),
        "w_qkv": weight(h * (2 * d_qk + d_v), c, seed + 1),
        "b_qkv": randn(h * (2 * d_qk + d_v), seed=seed + 2, scale=0.5),
        "w_proj": weight(c, h * d_v, seed + 3),
        "b_proj": randn(c, seed=seed + 4, scale=0.5),
    }
    if width is not None:
        size = {"all": (), "images": (b, 1), "heads": (1, h), "each": (b, h)}[per]
        angles = randn(*size, t - min(prefix, t), width, seed=seed + 5)
        tensors |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    if norm is not None:
        tensors |= {"q_norm": 1 + randn(2, d_qk, seed=seed + 6), "k_norm": 1 + randn(2, d_qk, seed=seed + 7)}
    return tensors


def static_of(h, d_qk, **more):
    return {"num_heads": h, "d_qk": d_qk, "scale": d_qk**-0.5, **more}


def check(tensors, dtype, tables=None, **static):
    """The rule for ops.rep_attention on tensors rounded to dtype (tables: theirs)."""
    rounded = {n: t.to(tables if tables and n.startswith("rotary") else dtype) for n, t in tensors.items()}
    wide = {n: t.double() for n, t in rounded.items()}
    ours = ops.rep_attention(**rounded, **static)
    assert_follows_rule(ours, reference.rep_attention(**rounded, **static), reference.rep_attention(**wide, **static))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_truth(shape, norm, layout, dtype):
    h, d_qk = shape[3:5]
    tensors = operands(*shape, prefix=1, width=d_qk, norm=NORMS[norm])
    static = static_of(h, d_qk, norm_eps=1e-6, residual=True, rotary_layout=layout)
    if NORMS[norm] is not None:
        static |= {"qk_norm": norm, "qk_norm_eps": NORMS[norm]}
    check(tensors, dtype, **static)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per", ["all", "images", "heads", "each"])
@pytest.mark.parametrize("width", [2, 10, 16])
def test_every_table(per, width, layout):
    check(operands(2, 21, 24, 3, 16, 8, 2, width, per), torch.float32, **static_of(3, 16, rotary_layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_of_float32_beside_narrow_tokens(dtype):
    check(operands(2, 21, 24, 3, 16, 8, 1, 16), dtype, torch.float32, **static_of(3, 16))


def test_prefix_tokens_and_other_channels_stay():
    tensors = operands(1, 6, 8, 1, 8, 8, prefix=2, width=4)
    q = randn(1, 1, 6, 8)
    turned = reference.rotate(q, tensors["rotary_cos"], tensors["rotary_sin"], "half")
    assert torch.equal(turned[:, :, :2], q[:, :, :2])
    assert torch.equal(turned[..., 4:], q[..., 4:])
    assert not torch.equal(turned[:, :, 2:, :4], q[:, :, 2:, :4])


def test_layouts_are_one_rotation_in_two_orders():
    """Interleaved tables and weights, their channels permuted, are those of halves."""
    tensors = operands(2, 9, 16, 2, 8, 8, width=8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    rows = torch.cat([order + 8 * i for i in range(4)] + [torch.arange(32, 48)])
    other = dict(tensors, w_qkv=tensors["w_qkv"][rows], b_qkv=tensors["b_qkv"][rows])
    other |= {n: tensors[n][:, order] for n in ("rotary_cos", "rotary_sin")}
    torch.testing.assert_close(
        ops.rep_attention(**other, **static_of(2, 8, rotary_layout="half")),
        ops.rep_attention(**tensors, **static_of(2, 8, rotary_layout="interleaved")),
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_stacks_turn_each_image_by_its_own_tables(batch, threads):
    tensors = operands(batch, 33, 16, 2, 8, 8, 1, 8, "each", norm=1e-6)
    tensors = {n: t.float() for n, t in tensors.items()}
    x = tensors.pop("x")
    static = static_of(2, 8, residual=True, qk_norm_eps=1e-6, norm_eps=None)
    weights = tuple(
        tensors[n] if n else None
        for n in ("w_qkv", "b_qkv", "w_proj", "b_proj", None, "rotary_cos", "rotary_sin", "q_norm", "k_norm")
    )
    plan = stack_plan.encode([Step("rep_attention", weights, static)] * 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        both = ops.rep_attention(ops.rep_attention(x, **tensors, **static), **tensors, **static)
        y = torch.ops.repavit_ops.fused_blocks(x, plan[0], plan=plan[1], scalars=plan[2])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, both, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(backends.why_unavailable("cpp") is not None, reason="kept plans are of the C++ library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per", ["all", "each"])
def test_kept_plans_take_the_tables_of_each_call(per, dtype):
    tensors = {n: t.to(dtype) for n, t in operands(3, 21, 16, 2, 8, 8, 1, norm=1e-6).items()}
    x = tensors.pop("x")
    static = static_of(2, 8, residual=True, qk_norm_eps=1e-6, norm_eps=1e-6, rotary_layout="interleaved")
    weights = tuple(
        tensors[n] if n else None for n in ("w_qkv", "b_qkv", "w_proj", "b_proj", None, None, None, "q_norm", "k_norm")
    )
    kept = KeptPlan(stack_plan.encode([Step("rep_attention", weights, static)] * 2))
    for seed in (1, 2):
        tables = operands(3, 21, 16, 2, 8, 8, 1, 8, per, seed=seed)
        cos, sin = (tables[n].to(dtype) for n in ("rotary_cos", "rotary_sin"))
        expected = x
        for _ in range(2):
            expected = ops.rep_attention(expected, **tensors, rotary_cos=cos, rotary_sin=sin, **static)
        y = kept(x, (cos, sin))
        assert torch.equal(y, expected)
        with FlopCounterMode(display=False):
            assert torch.equal(kept(x, (cos, sin)), expected)
    with pytest.raises(RuntimeError, match="rotary_cos: is for 22 tokens"):
        kept(x, (torch.ones(22, 8), torch.zeros(22, 8)))
    plain = ops.rep_attention(ops.rep_attention(x, **tensors, **static), **tensors, **static)
    assert torch.equal(kept(x), plain)


BAD = {
    "one_table": ({"rotary_sin": None}, "rotary_sin: got None beside rotary_cos"),
    "too_many_tokens": ({"rotary_cos": torch.zeros(10, 8), "rotary_sin": torch.zeros(10, 8)}, "at most 9 tokens"),
    "odd_width": ({"rotary_cos": torch.zeros(9, 7), "rotary_sin": torch.zeros(9, 7)}, "even width of at most d_qk = 8"),
    "too_wide": ({"rotary_cos": torch.zeros(9, 10), "rotary_sin": torch.zeros(9, 10)}, "at most d_qk = 8"),
    "unequal": ({"rotary_sin": torch.zeros(8, 8)}, "rotary_sin: got shape"),
    "other_heads": ({"rotary_cos": torch.zeros(3, 9, 8), "rotary_sin": torch.zeros(3, 9, 8)}, "rotary_cos: got shape"),
    "table_dtype": ({"rotary_cos": torch.zeros(9, 8).half()}, "rotary_cos: got torch.float16"),
    "layout": ({"rotary_layout": "pairs"}, "rotary_layout: got 'pairs'"),
    "no_k_norm": ({"k_norm": None}, "k_norm: got None beside qk_norm_eps"),
    "no_eps": ({"qk_norm_eps": None}, "q_norm: got a tensor without qk_norm_eps"),
    "norm_shape": ({"q_norm": torch.zeros(2, 7)}, "q_norm: got shape"),
    "norm_name": ({"qk_norm": "batch"}, "qk_norm: got 'batch'"),
    "norm_eps": ({"qk_norm_eps": -1.0}, "qk_norm_eps: got -1"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(change, message):
    tensors = {n: t.float() for n, t in operands(2, 9, 16, 2, 8, 8, 0, 8, norm=1e-6).items()}
    with pytest.raises(ValueError, match=message):
        ops.rep_attention(**{**tensors, **static_of(2, 8, qk_norm_eps=1e-6), **change})


# --- folds ------------------------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """Attention as models with QK-norm and rotary embedding write it."""

    def __init__(self, norm):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.q_norm, self.k_norm = (nn.Identity(), nn.Identity()) if norm is None else (norm(8), norm(8))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k = (reference.rotate(t, cos, sin, "half") for t in (self.q_norm(q), self.k_norm(k)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.RMSNorm], ids=["none", "layer", "rms"])
def test_folds_are_exact_and_keep_what_must_stay(norm):
    torch.manual_seed(3)
    model, ln = Turned(norm).double(), nn.LayerNorm(16).double()
    nn.init.normal_(ln.weight)
    nn.init.normal_(ln.bias)
    angles = randn(9, 8)
    x, tables = randn(2, 9, 16), (angles.cos(), angles.sin())
    parts = AttentionParts(
        *(model.qkv, model.proj, 2, 8, 8**-0.5),
        norm=ln,
        residual=True,
        q_norm=model.q_norm,
        k_norm=model.k_norm,
        rotary_layout="half",
    )
    fused = fold_attention(parts, "reference")
    assert isinstance(fused, RepAttention)
    with torch.no_grad():
        torch.testing.assert_close(fused(x, None, tables), x + model(ln(x), *tables), rtol=1e-12, atol=1e-12)
    assert fused.b_qkv[16:32].abs().max() > 0  # the K bias
