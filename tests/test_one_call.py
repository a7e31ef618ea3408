"""Whole classifiers in one operator call: what their parts give one by one, and when one call would not be the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_helpers import Recorder, images, in_threads, randomise, tiny_swin, tiny_vit
from op_helpers import DTYPES, assert_follows_rule, cast, randn, weight
from torch import nn

import repavit_ops
from repavit_ops import backends, ops, reference, stack_plan
from repavit_ops.models import LVViT, SwinTransformer, VisionTransformer
from repavit_ops.stack.route import KEPT
from repavit_ops.stack_plan import Step

torch_ops = torch.ops.repavit_ops
needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
MODELS = {
    "vit": lambda: tiny_vit(),
    "vit_mean": lambda: tiny_vit(global_pool="avg", pre_norm=False),
    "vit_no_head": lambda: tiny_vit(num_classes=0),
    "vit_plain_head": lambda: tiny_vit(head_bias=False, qkv_bias=False),
    "swin": lambda: tiny_swin(),
    "swin_no_head": lambda: tiny_swin(num_classes=0),
}
CALLS = 8  # one image's ten logits are too few to compare two maxima of errors


def size_of(model):
    return 64 if isinstance(model, SwinTransformer) else 32


def part_by_part(model, x):
    return model.forward_head(model.forward_features(x))


@needs_cpp
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_is_one_call_and_follows_the_rule(name, batch, dtype):
    model = MODELS[name]()
    x = images(CALLS * batch, size_of(model)).to(dtype)
    batches = x.split(batch) if batch else [x]
    fused = repavit_ops.fuse(model, dtype=dtype)
    plain = repavit_ops.reparameterize(model)
    truth = copy.deepcopy(plain).double()(x.double())
    assert fused.why_apart(batches[0]) is None
    fused(batches[0])  # looks at the parts
    with Recorder() as recorder:
        ours = [fused(some) for some in batches]
    assert recorder.calls == ["repavit_ops::fused_blocks"] * len(batches)
    assert torch.equal(torch.cat([fused(some) for some in batches]), torch.cat(ours))  # unrecorded: from the kept plan
    assert_follows_rule(torch.cat(ours), plain.to(dtype)(x), truth)


@needs_cpp
@torch.no_grad()
def test_other_images_than_the_model_was_built_for():
    fused = repavit_ops.fuse(tiny_vit())
    for height, width in ((32, 32), (40, 24), (8, 8), (24, 40), (32, 32)):
        x = images(2, height, width)
        for strided in (x, x.transpose(2, 3).contiguous().transpose(2, 3), images(2, height, width + 3)[..., 3:]):
            assert fused.why_apart(strided) is None
            torch.testing.assert_close(fused(strided), part_by_part(fused, strided), rtol=1e-5, atol=1e-5)


@needs_cpp
@torch.no_grad()
def test_ever_new_sizes_do_not_pile_up():
    fused = repavit_ops.fuse(tiny_vit())
    for side in range(1, 40):
        fused(images(1, 8, 8 * side))
    assert len(fused._routes) <= KEPT
    assert len(fused.blocks._routes) <= KEPT
    for side in range(1, 40):
        fused.blocks(torch.randn(1, side, 48))
    assert len(fused.blocks._routes) <= KEPT


@needs_cpp
@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin], ids=["vit", "swin"])
def test_threads_and_neighbours_change_nothing(build):
    fused = repavit_ops.fuse(build())
    x = images(5, size_of(fused))
    expected = fused(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(fused(x), expected)
            assert torch.equal(fused(x[1:2]), expected[1:2])
    finally:
        torch.set_num_threads(before)


def _hooked(model):
    model.norm.register_forward_hook(lambda *_: None)


def _hooked_block(model):
    model.get_submodule("blocks" if hasattr(model, "blocks") else "layers.0.blocks").register_forward_pre_hook(
        lambda *_: None
    )


def _dropping(model):
    model.head_drop.p = 0.5
    model.head_drop.train()


def _patched(model):
    model.pool = lambda x: x.amax(dim=tuple(range(1, x.dim() - 1)))


def _other_head(model):
    model.head = nn.Sequential(nn.Linear(model.num_features, 3))


def _other_norm(model):
    model.norm = nn.RMSNorm(model.num_features)


def _unfused_embedding(model):
    conv = model.patch_embed.proj
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=conv.bias is not None)
    plain.load_state_dict(conv.state_dict())
    model.patch_embed.proj = plain


def _reference(model):
    next(m for m in model.modules() if isinstance(m, repavit_ops.nn.PartialGELUFFN)).backend = "reference"


SPOILED = {
    "hooks": _hooked,
    "forward hooks": _hooked_block,
    "dropout": _dropping,
    "pool of its own": _patched,
    "head is a Sequential": _other_head,
    "RMSNorm": _other_norm,
    "is a Conv2d": _unfused_embedding,
    "C++ kernels": _reference,
}


@needs_cpp
@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin], ids=["vit", "swin"])
@pytest.mark.parametrize("reason", SPOILED)
@pytest.mark.parametrize("called_before", [False, True])
def test_falls_apart_where_one_call_would_not_be_the_same(build, reason, called_before):
    fused = repavit_ops.fuse(build())
    x = images(2, size_of(fused))
    if called_before:
        fused(x)
    SPOILED[reason](fused)
    assert reason in fused.why_apart(x)
    torch.manual_seed(0)
    with Recorder() as recorder:
        ours = fused(x)
    assert recorder.calls.count("repavit_ops::fused_blocks") != 1 or len(recorder.calls) > 1
    torch.manual_seed(0)
    assert torch.equal(ours, part_by_part(fused, x))


@needs_cpp
def test_falls_apart_under_gradients_autocast_and_forward_mode():
    fused, x = repavit_ops.fuse(tiny_vit()), images(1)
    with torch.no_grad():
        expected = fused(x)
    fused.requires_grad_(True)
    assert "gradients" in fused.why_apart(x)
    fused(x).sum().backward()
    assert fused.cls_token.grad is not None
    assert fused.head.weight.grad is not None
    fused.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in fused.why_apart(x)
        assert fused(x).dtype == torch.bfloat16
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value, tangent = torch.func.jvp(fused, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert tangent.abs().max() > 0


@torch.no_grad()
def test_a_class_with_a_forward_of_its_own_keeps_it():
    class Doubling(VisionTransformer):
        def forward_head(self, x, pre_logits=False):
            return 2 * super().forward_head(x, pre_logits)

    config = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    model, x = randomise(Doubling(**config)), images(1)
    torch.testing.assert_close(repavit_ops.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)
    lv = randomise(LVViT(**{**config, "num_heads": 3, "idle_ratio": 0.75}))
    fused = repavit_ops.fuse(lv)
    assert fused.why_apart(x) is not None
    torch.testing.assert_close(fused(x), lv(x), rtol=1e-4, atol=1e-5)


@needs_cpp
@torch.no_grad()
def test_what_stays_apart_is_looked_at_once(monkeypatch):
    fused, x, looks = repavit_ops.fuse(tiny_swin()), images(1, 62), []
    segments = SwinTransformer._segments
    monkeypatch.setattr(SwinTransformer, "_segments", lambda self, x: (looks.append(1), segments(self, x))[1])
    for _ in range(3):
        fused(x)
    assert looks == [1]
    fused(images(1, 64))
    _other_norm(fused)
    fused(x)
    assert len(looks) == 3


@torch.no_grad()
@pytest.mark.parametrize("x", [images(1, 30), images(1).double(), images(1)[0]], ids=["size", "dtype", "dim"])
def test_wrong_images_get_the_same_error_as_before(x):
    model = tiny_vit()
    fused = repavit_ops.fuse(model)
    with pytest.raises((ValueError, RuntimeError)) as plain:
        part_by_part(fused, x)
    with pytest.raises(plain.type) as ours:
        fused(x)
    assert str(ours.value) == str(plain.value)


@needs_cpp
@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin], ids=["vit", "swin"])
def test_edits_are_seen_at_the_next_call(build):
    fused = repavit_ops.fuse(build())
    x = images(1, size_of(fused))
    for name, parameter in list(fused.named_parameters()):
        before = fused(x)
        parameter.add_(torch.randn_like(parameter))
        after = fused(x)
        torch.testing.assert_close(after, part_by_part(fused, x), rtol=1e-4, atol=1e-4)
        if "embed" in name or "norm" in name or "head" in name or "token" in name:
            assert not torch.equal(before, after), name
    fused.reset_classifier(7)
    assert fused.why_apart(x) is None
    torch.testing.assert_close(fused(x), part_by_part(fused, x))
    fused.load_state_dict(build(seed=3, num_classes=7, **{}).state_dict(), strict=False)
    torch.testing.assert_close(fused(x), part_by_part(fused, x), rtol=1e-4, atol=1e-4)


@needs_cpp
@torch.no_grad()
def test_pooling_and_size_follow_the_model():
    fused, x = repavit_ops.fuse(tiny_vit()), images(1)
    token = fused(x)
    fused.set_global_pool("avg")
    assert not torch.allclose(fused(x), token)
    torch.testing.assert_close(fused(x), part_by_part(fused, x))
    fused.set_input_size(48)
    torch.testing.assert_close(fused(images(1, 48)), part_by_part(fused, images(1, 48)))


@needs_cpp
@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin], ids=["vit", "swin"])
def test_copies_pickles_and_dropped_weights(build):
    model = build()
    fused = repavit_ops.fuse(model)
    x = images(2, size_of(fused))
    expected = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), repavit_ops.fuse(fused)):
        assert other.why_apart(x) is None
        assert torch.equal(other(x), expected)
    lean = repavit_ops.fuse(model, keep_unpacked=False)
    assert lean.why_apart(x) is None
    assert torch.equal(lean(x), expected)


@needs_cpp
@torch.no_grad()
def test_calls_from_several_threads():
    fused, inputs = repavit_ops.fuse(tiny_swin()), [images(2, 64, seed=i) for i in range(4)]
    expected, results = [part_by_part(fused, x) for x in inputs], in_threads(fused, inputs, times=10)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_cpp
def test_the_report_tells_of_the_one_call():
    fused = repavit_ops.fuse(tiny_vit())
    entry = repavit_ops.fusion_report(fused).entries[0]
    assert (entry.name, entry.status) == ("VisionTransformer", "stacked")
    assert "whole model" in entry.note
    _hooked(fused)
    assert repavit_ops.fusion_report(fused).entries[0].status == "apart"
    assert "VisionTransformer" not in {e.name for e in repavit_ops.fusion_report(tiny_vit()).entries}


# --- the steps at both ends of a model --------------------------------------------------------------------------------

EMBEDDINGS = {  # batch, channels, H, W, patch, N, prefix rows (None: a map)
    "deit_tiny": (2, 3, 64, 48, (16, 16), 192, 1),
    "registers": (3, 3, 28, 28, (7, 7), 33, 5),
    "no_prefix": (2, 3, 16, 16, (4, 4), 40, 0),
    "map": (2, 3, 20, 24, (4, 4), 96, None),
    "primes": (1, 5, 23, 29, (3, 7), 37, 2),
    "one_patch": (4, 3, 8, 8, (8, 8), 17, 1),
    "no_images": (0, 3, 8, 8, (4, 4), 8, 1),
}


def embedding_step(case, with_position=True, norm_eps=1e-6, dtype=torch.float64):
    """x and the step, seeded."""
    batch, channels, height, width, patch, n, prefix = case
    patches = (height // patch[0]) * (width // patch[1])
    tensors = (
        weight(n, channels * patch[0] * patch[1], 1),
        randn(n, seed=2),
        randn(prefix, n, seed=3) if prefix is not None else None,
        randn((prefix or 0) + patches, n, seed=4) if with_position else None,
        1 + 0.1 * randn(n, seed=5) if norm_eps is not None else None,
        randn(n, seed=6) if norm_eps is not None else None,
    )
    static = {"patch": patch, "as_map": prefix is None, "norm_eps": norm_eps}
    return randn(batch, channels, height, width).to(dtype), Step("token_embedding", cast(tensors, dtype), static)


HEADS = {  # batch, tokens or (H, W), C, N (None: no head), first, count
    "class_token": (2, 17, 48, 10, 0, 1),
    "mean_of_patches": (3, 17, 48, 1000, 1, 0),
    "map": (5, (7, 7), 96, 33, 0, 0),
    "some_tokens": (4, 11, 37, 7, 3, 5),
    "no_head": (2, 9, 40, None, 1, 0),
    "one_of_each": (1, 1, 1, 1, 0, 0),
    "no_outputs": (2, 5, 8, 0, 0, 1),
    "no_images": (0, 5, 8, 3, 0, 1),
}


def head_step(case, norm_eps=1e-6, bias=True, dtype=torch.float64):
    """x and the step, seeded."""
    batch, tokens, c, n, first, count = case
    size = tokens if isinstance(tokens, tuple) else (tokens,)
    tensors = (
        None if n is None else weight(n, c, 1),
        randn(n, seed=2) if bias and n is not None else None,
        1 + 0.1 * randn(c, seed=3) if norm_eps is not None else None,
        randn(c, seed=4) if norm_eps is not None else None,
    )
    static = {"first": first, "count": count, "norm_eps": norm_eps}
    return randn(batch, *size, c).to(dtype), Step("pooled_head", cast(tensors, dtype), static)


def check_step(make, dtype):
    x, step = make(torch.float64)
    x, step = x.to(dtype), Step(step.operator, cast(step.tensors, dtype), step.static)
    exact = Step(step.operator, cast(step.tensors, torch.float64), step.static)
    truth = reference.run_step(exact, x.double())
    ours = ops.fused_blocks(x, [step])
    assert_follows_rule(ours, reference.run_step(step, x), truth)
    strided = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=dtype)[..., 3:].copy_(x)
    assert torch.equal(ops.fused_blocks(strided, [step]), ours)


@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["", "norm"])
@pytest.mark.parametrize("with_position", [False, True], ids=["", "position"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_token_embedding_matches_truth(case, dtype, with_position, norm_eps):
    check_step(lambda d: embedding_step(case, with_position, norm_eps, d), dtype)


@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["", "norm"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS.keys())
def test_pooled_head_matches_truth(case, dtype, bias, norm_eps):
    check_step(lambda d: head_step(case, norm_eps, bias, d), dtype)


def test_shapes_and_gradients_of_the_operator_are_those_of_the_steps():
    x, embed = embedding_step(EMBEDDINGS["primes"])
    _, head = head_step((1, 14, 37, 5, 1, 0))
    weights, plan, scalars = stack_plan.encode([embed, head])
    torch.library.opcheck(torch_ops.fused_blocks.default, (x, weights), {"plan": plan, "scalars": scalars})
    x.requires_grad_()
    (ours,) = torch.autograd.grad(torch_ops.fused_blocks(x, weights, plan=plan, scalars=scalars).sum(), x)
    (theirs,) = torch.autograd.grad(reference.run_step(head, reference.run_step(embed, x)).sum(), x)
    torch.testing.assert_close(ours, theirs)


@needs_cpp
def test_bad_steps_are_refused():
    x, embed = embedding_step(EMBEDDINGS["deit_tiny"])
    tensors = embed.tensors

    def refused(match, x, step, position, value, **static):
        changed = (*step.tensors[:position], value, *step.tensors[position + 1 :])
        with pytest.raises(RuntimeError, match=match):
            ops.fused_blocks(x, [Step(step.operator, changed, {**step.static, **static})])

    refused(r"position: got shape \[12, 192\], wanted \[13, 192\]", x, embed, 3, tensors[3][1:])
    refused(r"prefix: got shape \[1, 191\]", x, embed, 2, tensors[2][:, 1:])
    refused("norm_weight, norm_bias: both", x, embed, 5, None)
    refused("prefix: got .*Float", x, embed, 2, tensors[2].float())
    refused("holds no patch of 80x16", x, embed, 0, randn(192, 3 * 80 * 16), patch=(80, 16))
    refused("a map has no rows in front", x, embed, 3, None, as_map=True)
    x, head = head_step(HEADS["some_tokens"])
    refused("first, count: got 9 and 5 for 11 tokens", x, head, 1, None, first=9)
    refused(r"weight: got shape \[7, 36\]", x, head, 0, head.tensors[0][:, 1:])
    refused("bias: is given without a weight", x, head, 0, None)
    refused("norm_weight, norm_bias: both", x, head, 2, None)
    refused(r"x: got shape \[11, 37\]", x[0], head, 1, None)
