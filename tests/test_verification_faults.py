"""verify() sees faults that a fold, a swap or a kernel can have: each is planted alone in a model that is equal."""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import images, randomise, tiny_swin, tiny_vit
from torch import nn

import repavit_ops
from repavit_ops import backends
from repavit_ops.models import SwinTransformer, VisionTransformer
from repavit_ops.nn import PartialGELUFFN, QuickGELU, RepAttention

KERNELS = backends.why_unavailable("cpp") is None
DTYPES = [torch.float32, torch.bfloat16]


def vanilla_vit(**overrides):
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    return randomise(VisionTransformer(**{**config, **overrides}))


def part(model, kind, index=1):
    """One fused sub-block, in the middle of the model or at its end."""
    return [module for module in model.modules() if isinstance(module, kind)][index]


def swap(tensor, i, j, dim=0):
    """Exchange two rows, or columns, of a weight; versions are counted, so packed copies follow."""
    order = list(range(tensor.shape[dim]))
    order[i], order[j] = j, i
    with torch.no_grad():
        tensor.copy_(tensor.index_select(dim, torch.tensor(order)))


def check(model, fused, plant, inputs):
    """Equal before the fault, found after it."""
    report = repavit_ops.verify(model, fused, inputs)
    assert report
    assert all(row.passed for row in report.blocks)
    plant(fused)
    report = repavit_ops.verify(model, fused, inputs)
    assert not report, str(report)
    return report


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "name", "dim"),
    [
        (PartialGELUFFN, "w_in", 0),  # a hidden channel, from here on: without its column of w_out
        (PartialGELUFFN, "w_in", 1),  # a channel of the tokens
        (PartialGELUFFN, "w_out", 0),
        (PartialGELUFFN, "w_out", 1),
        (PartialGELUFFN, "w_merged", 0),
        (PartialGELUFFN, "w_merged", 1),
        (RepAttention, "w_qkv", 1),
        (RepAttention, "w_proj", 0),
        (RepAttention, "w_proj", 1),
    ],
)
def test_one_swapped_channel(kind, name, dim, dtype):
    model = tiny_vit()
    fused = repavit_ops.fuse(model, dtype=dtype)
    assert repavit_ops.verify(model, fused, images())
    swap(getattr(part(fused, kind), name), 3, 11, dim)
    report = repavit_ops.verify(model, fused, images())
    assert [row.passed for row in report.blocks] == [True, False]
    # 16-bit rounding of ten logits may hide one hidden channel of the last block; the block's own row does not
    assert not report or (dtype == torch.bfloat16 and "over blocks.1" in str(report))


def test_one_swapped_channel_of_the_image_and_of_a_bias():
    model = tiny_vit()
    check(model, repavit_ops.fuse(model), lambda m: swap(m.patch_embed.proj.weight, 0, 2, 1), images())
    check(model, repavit_ops.fuse(model), lambda m: swap(part(m, PartialGELUFFN).b_in, 3, 11), images())


@pytest.mark.parametrize(
    ("right", "wrong"), [("none", "tanh"), ("none", "quick"), ("tanh", "none"), ("tanh", "quick"), ("quick", "none")]
)
@pytest.mark.parametrize("which", [0, 1], ids=["first block", "last block"])
def test_another_gelu_in_one_block(right, wrong, which):
    act = {"none": nn.GELU, "tanh": lambda: nn.GELU("tanh"), "quick": QuickGELU}[right]
    model = vanilla_vit()
    for block in model.blocks:
        block.mlp.act = act()
    fused = repavit_ops.fuse(model)
    assert part(fused, PartialGELUFFN, which).approximate == right

    def plant(m):
        part(m, PartialGELUFFN, which).approximate = wrong

    check(model, fused, plant, images())


def test_another_gelu_in_a_model_that_was_not_fused():
    model, other = vanilla_vit(), vanilla_vit()

    def plant(m):
        m.blocks[1].mlp.act = nn.GELU("tanh")

    check(model, other, plant, images())


class Turned(nn.Module):
    """Attention whose q and k are turned, as in DINOv3: there the K bias is no constant of a row."""

    def __init__(self, qk_norm):
        super().__init__()
        self.attn = RepAttention(48, 3, norm_eps=1e-6, residual=True, qk_norm_eps=1e-6 if qk_norm else None)
        angles = torch.arange(9.0)[:, None] * torch.logspace(0, -2, 8)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        self.turns = not qk_norm

    def forward(self, x):
        return self.attn(x, rotary=(self.cos, self.sin) if self.turns else None)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["rotary", "QK-norm"])
def test_a_dropped_k_bias_where_it_counts(qk_norm):
    model = randomise(Turned(qk_norm))
    if qk_norm:
        with torch.no_grad():
            model.attn.k_norm.copy_(torch.tensor([[1.0], [0.0]]).expand(2, 16))

    def plant(m):
        with torch.no_grad():
            m.attn.b_qkv[48:96] = 0

    check(model, copy.deepcopy(model), plant, torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3)))


def test_a_dropped_k_bias_beside_padded_windows():
    model = randomise(SwinTransformer(img_size=32, embed_dim=24, depths=[2], num_heads=[2], window_size=5))
    fused = repavit_ops.fuse(model)
    attn = next(module for module in fused.modules() if isinstance(module, RepAttention))
    rows = attn.num_heads * attn.d_qk

    def plant(m):
        with torch.no_grad():
            attn.pad_kv[:rows] = 0

    check(model, fused, plant, images())


def test_a_k_bias_that_softmax_ignores_may_go():
    """The fold that is exact passes: the fault above is not a rule against K biases."""
    model = vanilla_vit()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].attn.qkv.bias[48:96] = 0
    assert repavit_ops.verify(model, other, images())


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [PartialGELUFFN, RepAttention])
def test_a_missing_residual(kind, dtype):
    model = vanilla_vit()
    fused = repavit_ops.fuse(model, dtype=dtype)
    assert part(fused, kind).residual

    def plant(m):
        part(m, kind).residual = False

    check(model, fused, plant, images())


def test_a_residual_twice():
    model = vanilla_vit()
    fused = repavit_ops.fuse(model)

    def plant(m):
        with torch.no_grad():
            part(m, RepAttention).w_proj.mul_(2)

    check(model, fused, plant, images())
    merged = repavit_ops.fuse(tiny_vit(), backend="reference")
    assert not part(merged, PartialGELUFFN).residual  # folded into w_merged

    def twice(m):
        part(m, PartialGELUFFN).residual = True

    check(tiny_vit(), merged, twice, images())


@pytest.mark.parametrize(("right", "wrong"), [(1e-5, 1e-6), (1e-5, 1e-3)])
def test_a_changed_eps_of_a_batchnorm(right, wrong):
    model = tiny_vit()
    other = copy.deepcopy(model)
    norms = [module for module in other.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(norm.eps == right for norm in norms)
    for norm in norms:
        norm.eps = wrong
    assert repavit_ops.verify(model, repavit_ops.fuse(model), images())
    assert not repavit_ops.verify(model, repavit_ops.fuse(other), images())
    assert not repavit_ops.verify(model, repavit_ops.reparameterize(other), images())


def test_a_changed_eps_of_a_layernorm():
    model = vanilla_vit()

    def plant(m):
        part(m, PartialGELUFFN).norm_eps = 1e-4

    check(model, repavit_ops.fuse(model), plant, images())


@pytest.mark.skipif(not KERNELS, reason="no C++ kernels")
def test_one_stale_packed_weight():
    """A single number written behind PyTorch's back, of which the packed copy keeps the old value."""
    model = tiny_vit()
    fused = repavit_ops.fuse(model)
    x = images()
    with torch.no_grad():
        before = fused(x)
        ffn = fused.blocks[1].mlp
        for row in range(ffn.w_in.shape[0]):
            old = ffn.w_in[row, 7].clone()
            ffn.w_in.data[row, 7] += 1.0
            if torch.equal(fused(x), before):
                break  # no writer was seen: this copy is stale
            ffn.w_in.data[row, 7] = old
            assert torch.equal(fused(x), before)
        else:
            pytest.fail("every single number was noticed; take another way to make a copy stale")
        edited = copy.deepcopy(fused)  # packs anew: what is right
    assert not repavit_ops.verify(edited, fused, x)
    fused.blocks[1].mlp.repack()
    assert repavit_ops.verify(edited, fused, x)


@pytest.mark.skipif(not KERNELS, reason="no C++ kernels")
def test_a_fault_of_the_one_call_alone():
    """Hooks would take the model part by part, and around what a user runs."""
    model = tiny_vit()
    fused = repavit_ops.fuse(model)
    x = images()
    with torch.no_grad():
        fused(x)
    (route,) = fused._routes.values()
    other = repavit_ops.fuse(tiny_vit(seed=5))
    with torch.no_grad():
        other(x)
    object.__setattr__(route, "calls", next(iter(other._routes.values())).calls)
    report = repavit_ops.verify(model, fused, x)
    assert not report
    assert all(row.passed for row in report.blocks)


@pytest.mark.skipif(not KERNELS, reason="no C++ kernels")
def test_a_fault_of_the_parts_alone():
    model = tiny_vit()
    fused = repavit_ops.fuse(model)
    ffn = fused.blocks[0].mlp
    ffn.backend_for = lambda x: (_ for _ in ()).throw(AssertionError("called as a part"))
    with pytest.raises(AssertionError, match="called as a part"):
        repavit_ops.verify(model, fused, images())


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ["q", "k", "v", "proj"])
def test_transposed_heads(rows, dtype):
    """Channels that stand head by head, read as if they stood channel by channel."""
    model = vanilla_vit()
    fused = repavit_ops.fuse(model, dtype=dtype)

    def plant(m):
        attn = part(m, RepAttention)
        size = attn.num_heads * attn.d_qk
        order = torch.arange(size).view(attn.num_heads, attn.d_qk).T.flatten()
        with torch.no_grad():
            if rows == "proj":
                attn.w_proj.copy_(attn.w_proj[:, order])
            else:
                first = "qkv".index(rows) * size
                attn.w_qkv[first : first + size] = attn.w_qkv[first : first + size][order]

    check(model, fused, plant, images())


def test_a_fault_in_windows():
    model = tiny_swin()

    def plant(m):
        part(m, RepAttention, 1).shift = (1, 2)

    check(model, repavit_ops.fuse(model), plant, images(2, 64))

    def table(m):
        attn = part(m, RepAttention, 0)
        with torch.no_grad():
            attn.rel_bias.copy_(attn.rel_bias.transpose(1, 2).clone())

    check(model, repavit_ops.fuse(model), table, images(2, 64))


# --- outputs that show nothing ----------------------------------------------------------------------------------------


def headless(model):
    """A classifier whose head is zero, as timm starts some."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    return model


def test_behind_a_head_of_zeros_the_blocks_decide():
    model = headless(tiny_vit())
    fused = repavit_ops.fuse(model)
    report = repavit_ops.verify(model, fused, images())
    assert report
    assert report.output.silent
    assert "the outputs are zero, or too small to show an error: the blocks decide" in str(report)
    report = check(model, fused, lambda m: swap(part(m, PartialGELUFFN).w_in, 3, 11), images())
    assert report.output.passed
    assert report.to_dict()["passed"] is False
    assert not repavit_ops.verify(tiny_vit(), repavit_ops.fuse(tiny_vit()), images()).output.silent


def test_where_nothing_is_compared_the_report_says_so():
    zero = nn.Linear(4, 4).eval()
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    report = repavit_ops.verify(zero, zero, torch.ones(1, 4))
    assert "nothing was compared" in str(report)
