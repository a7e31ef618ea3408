"""timm's ViT-like models, unchanged and untrained: what fuses, what is skipped and why, and that outputs are equal.

``pytest -m sweep`` goes through the smallest model of every family of the installed timm at its own size.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from model_helpers import Recorder, images, randomise, relative
from torch import nn

import repavit_ops
from repavit_ops import backends
from repavit_ops.nn import Block, PartialGELUFFN, RepAttention, WindowRepAttention
from repavit_ops.nn.foreign_block import MaskedAttention
from repavit_ops.stack import FusedStack, LoopedBlocks

needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
ROTARY = {**VIT, "embed_dim": 48, "num_heads": 3}
XCIT = {"depth": 2, "img_size": 64, "num_classes": 5}
POOLING, POSITION = "attention pooling", "relative position"

# name → (keyword arguments, size of the images, fused sub-blocks, words of the reasons for what is skipped)
FAMILIES = {
    "vit_base_patch16_224": (VIT, 32, 4, ()),
    "vit_base_patch32_plus_256": (VIT, 32, 4, ()),
    "vit_wee_patch16_reg1_gap_256": (VIT, 32, 4, ()),
    "vit_tiny_r_s16_p8_224": ({"depth": 2, "embed_dim": 48, "img_size": 64}, 64, 4, ()),
    "deit_tiny_distilled_patch16_224": (VIT, 32, 4, ()),
    "deit3_small_patch16_224": (VIT, 32, 4, ()),
    "vit_small_patch14_dinov2": (VIT, 32, 4, ()),
    "vit_small_patch14_reg4_dinov2": (VIT, 32, 4, ()),
    "vit_giant_patch14_dinov2": (VIT, 32, 4, ()),
    "vit_base_patch16_clip_224": (VIT, 32, 4, ()),
    "vit_base_patch16_clip_quickgelu_224": (VIT, 32, 4, ()),
    "vit_base_patch16_siglip_224": (VIT, 32, 5, (POOLING,)),
    "vit_base_patch16_siglip_gap_224": (VIT, 32, 4, ()),
    "naflexvit_base_patch16_gap": ({k: v for k, v in VIT.items() if k not in ("img_size", "patch_size")}, 64, 4, ()),
    "vit_small_patch16_18x2_224": (VIT, 32, 8, ()),
    "vit_small_patch16_36x1_224": (VIT, 32, 4, ()),
    "vit_base_patch16_xp_224": (VIT, 32, 0, ("in parallel",)),
    "vit_dlittle_patch16_reg1_gap_256": (VIT, 32, 2, ("differential",)),
    "vit_small_patch16_dinov3": (VIT, 32, 4, ()),
    "vit_small_patch16_rope_224": (ROTARY, 32, 4, ()),
    "vit_small_patch16_rope_mixed_ape_224": (ROTARY, 32, 4, ()),
    "vit_pe_core_tiny_patch16_384": ({**ROTARY, "num_classes": 5}, 32, 5, (POOLING,)),
    "vit_relpos_small_patch16_224": (VIT, 32, 2, (POSITION, "ReLU", "no operator")),
    "vit_srelpos_small_patch16_224": (VIT, 32, 2, (POSITION, "ReLU", "no operator")),
    "eva02_tiny_patch14_224": (ROTARY, 32, 4, ()),
    "eva02_base_patch14_224": (ROTARY, 32, 4, ()),
    "eva02_large_patch14_224": ({**ROTARY, "qk_norm": True}, 32, 4, ()),
    "eva02_base_patch16_clip_224": (ROTARY, 32, 4, ()),
    "eva02_large_patch14_clip_224": (ROTARY, 32, 4, ()),
    "vit_base_patch16_sapiens2": ({**ROTARY, "num_heads": 4, "num_kv_heads": 2}, 32, 4, ()),
    "vit_pe_spatial_tiny_patch16_512": (ROTARY, 32, 4, ()),
    "beit_base_patch16_224": (VIT, 32, 4, ()),
    "beit3_base_patch16_224": (VIT, 32, 2, ("between activation and fc2",)),
    "aimv2_large_patch14_224": (VIT, 32, 4, ()),
    "samvit_base_patch16": ({**VIT, "img_size": 64, "window_size": 4}, 64, 2, (POSITION,)),
    "cait_xxs24_224": ({**VIT, "num_heads": 4}, 32, 4, ("talking heads", "class attention")),
    "xcit_nano_12_p16_224": (XCIT, 64, 4, ("class attention",)),
    "swin_tiny_patch4_window7_224": ({**SWIN, "img_size": 56}, 56, 8, ()),
    "swinv2_tiny_window8_256": ({**SWIN, "img_size": 64, "window_size": 4}, 64, 4, ("cosine",)),
    "swinv2_cr_tiny_224": ({**SWIN, "img_size": 64, "window_size": 4}, 64, 4, ("cosine", "ReLU")),
    "mobilevit_xxs": ({"num_classes": 5}, 64, 9, ("SiLU",)),
    "convnext_tiny": ({"depths": (1, 1, 1, 1), "dims": (24, 32, 48, 64), "num_classes": 5}, 64, 4, ()),
}


def build(timm, name="vit_base_patch16_224", **overrides):
    config = FAMILIES[name][0] if name in FAMILIES else VIT
    return randomise(timm.create_model(name, **{**config, **overrides}))


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_equals_the_original_and_the_report_names_the_rest(timm, name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    _, size, fused_count, words = FAMILIES[name]
    model, x = build(timm, name), images(2, size)
    fused = repavit_ops.fuse(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        assert relative(repavit_ops.fuse(exact)(x.double()), exact(x.double())) < 1e-12
    report = repavit_ops.verify(model, fused, x)
    assert report.passed, str(report)
    told = repavit_ops.fusion_report(fused)
    assert len(told.fused) == fused_count, str(told)
    reasons = {entry.note for entry in told.skipped}
    assert all(any(word in reason for reason in reasons) for word in words), reasons
    assert all(any(word in reason for word in words) for reason in reasons), reasons


@pytest.mark.sweep
def test_every_family_of_the_installed_timm(timm):
    """The smallest model of each module of timm.models that holds a known sub-block, at its default size."""
    smallest: dict[str, tuple[int, str]] = {}
    for name in timm.list_models(exclude_filters=repavit_ops.list_models()):
        family = timm.models.model_entrypoint(name).__module__
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        if repavit_ops.fusion_report(model).entries:
            size = sum(p.numel() for p in model.parameters())
            smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    wrong = []
    for _, name in smallest.values():
        model = randomise(timm.create_model(name)).double()
        x = torch.randn(1, *model.default_cfg["input_size"], dtype=torch.float64)
        with torch.no_grad():
            fused = repavit_ops.fuse(model)
            error = relative(fused(x), model(x))
        print(f"{name:<40} {error:.1e}  {str(repavit_ops.fusion_report(fused)).splitlines()[0]}")
        rounds = any("Fp32" in type(module).__name__ for module in model.modules())  # to float32, whatever comes in
        if not error < (1e-6 if rounds else 1e-10):
            wrong.append((name, error))
    assert not wrong
    assert len(smallest) > 40


# --- structure --------------------------------------------------------------------------------------------------------


def test_a_fused_block_holds_two_operators_and_nothing_else(timm):
    fused = repavit_ops.fuse(build(timm, "vit_small_patch14_dinov2"), strict=True)
    for block in fused.blocks:
        assert isinstance(block, Block)
        assert [type(child) for child in block.children()] == [RepAttention, PartialGELUFFN]
        assert block.attn.residual
        assert block.mlp.residual
        assert block.attn.norm_eps == 1e-6
    assert not any(isinstance(m, nn.LayerNorm) for m in fused.blocks.modules())


@needs_cpp
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224"])
def test_the_blocks_run_in_one_call(timm, name):
    model, x = build(timm, name), images(2, FAMILIES[name][1])
    fused = repavit_ops.fuse(model)
    stacks = [m for m in fused.modules() if isinstance(m, FusedStack)]
    assert len(stacks) == (2 if "swin" in name else 1)
    with torch.no_grad(), Recorder() as recorder:
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    own = [name.split("::")[1] for name in recorder.calls if name.startswith("repavit_ops::")]
    assert own == ["patch_projection", "fused_blocks"] * len(stacks)


def test_the_core_never_imports_timm():
    code = "import sys, torch, repavit_ops as r; r.fuse(torch.nn.GELU().eval()); print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"


def test_fusing_twice_pickles_and_state_dicts(timm):
    model, x = build(timm, "vit_giant_patch14_dinov2"), images()
    fused = repavit_ops.fuse(model)
    expected = fused(x)
    assert torch.equal(repavit_ops.fuse(fused)(x), expected)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
    other = repavit_ops.fuse(randomise(build(timm, "vit_giant_patch14_dinov2"), seed=7))
    assert not torch.equal(other(x), expected)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), expected)


def test_low_precision_passes_verification(timm):
    for name in ("vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224"):
        model = build(timm, name)
        report = repavit_ops.verify(model, repavit_ops.fuse(model, dtype=torch.bfloat16), images(2, FAMILIES[name][1]))
        assert report.passed, str(report)


# --- what callers do with timm's models -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["bool", "float", "padding", "causal"])
def test_attention_masks_reach_fused_blocks(timm, mask):
    model, x = build(timm).double(), images().double()
    fused = repavit_ops.fuse(model)
    tokens = 17
    keep = torch.rand(2, 1, tokens, tokens, generator=torch.Generator().manual_seed(3)) > 0.4
    if mask == "padding":  # tokens that attend nowhere: their attention output is proj(0)
        keep = (torch.arange(tokens) < 12).expand(2, tokens)
        keep = (keep[:, :, None] & keep[:, None, :]).unsqueeze(1)
    arguments = {
        "bool": {"attn_mask": keep},
        "float": {"attn_mask": torch.randn(3, tokens, tokens, dtype=torch.float64)},
        "padding": {"attn_mask": keep},
        "causal": {"is_causal": True},
    }[mask]
    expected = model.forward_features(x, **arguments)
    assert relative(expected, model.forward_features(x)) > 1e-3
    assert relative(fused.forward_features(x, **arguments), expected) < 1e-12


def test_masks_reach_attention_fused_without_its_norm(timm):
    model, x = build(timm, "vit_small_patch16_18x2_224").double(), images().double()
    fused = repavit_ops.fuse(model)
    assert isinstance(fused.blocks[0].attns[0].attn, MaskedAttention)
    expected = model.forward_features(x, is_causal=True)
    assert relative(fused.forward_features(x, is_causal=True), expected) < 1e-12


def test_a_mask_beside_is_causal_is_refused(timm):
    fused = repavit_ops.fuse(build(timm))
    with pytest.raises(ValueError, match="attn_mask, is_causal: got both"):
        fused.forward_features(images(), attn_mask=torch.zeros(17, 17), is_causal=True)


def test_naflex_images_of_different_sizes_keep_their_padding_masked(timm):
    model = build(timm, "naflexvit_base_patch16_gap").double()
    patches = torch.randn(2, 12, 768, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    coordinates = torch.stack([y.flatten(), x.flatten()], -1).expand(2, -1, -1)
    valid = torch.arange(12).expand(2, -1) < torch.tensor([[12], [8]])
    batch = {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}
    expected = model(batch)
    assert relative(repavit_ops.fuse(model)(batch), expected) < 1e-12


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_intermediate_features_stay_available(timm, name):
    model, x = build(timm, name).double(), images(2, FAMILIES[name][1]).double()
    fused = repavit_ops.fuse(model)
    for a, b in zip(fused.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
        assert relative(a, b) < 1e-12
    config = {**FAMILIES[name][0], "features_only": True, "out_indices": (0, 1)}
    config.pop("num_classes")
    features = randomise(timm.create_model(name, **config)).double()
    for a, b in zip(repavit_ops.fuse(features)(x), features(x), strict=True):
        assert relative(a, b) < 1e-12


def test_dynamic_image_sizes(timm):
    model = build(timm, dynamic_img_size=True).double()
    fused = repavit_ops.fuse(model)
    for size in ((32, 32), (24, 56)):
        x = images(2, *size).double()
        assert relative(fused(x), model(x)) < 1e-12
    resized = build(timm)
    fused = repavit_ops.fuse(resized)
    for m in (resized, fused):
        m.set_input_size((48, 40))
    assert relative(fused(images(2, 48, 40)), resized(images(2, 48, 40))) < 1e-5


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"img_size": 56}, [(56, 56)]),
        ({"img_size": (52, 92), "window_size": 4}, [(52, 92)]),
        ({"img_size": 64, "window_size": (4, 2)}, [(64, 64)]),
        ({"img_size": 16, "window_size": 7}, [(16, 16)]),
        ({"img_size": 64, "window_size": 4, "strict_img_size": False}, [(64, 64), (52, 92), (8, 120)]),
        ({"img_size": 64, "window_size": 4, "always_partition": True, "strict_img_size": False}, [(64, 64), (12, 20)]),
    ],
    ids=["stock", "padded", "oblong_window", "window_covers_map", "dynamic", "always_partition"],
)
def test_swin_at_any_size(timm, config, sizes):
    model = build(timm, "swin_tiny_patch4_window7_224", **config).double()
    fused = repavit_ops.fuse(model, strict=True)
    assert sum(isinstance(m, WindowRepAttention) for m in fused.modules()) == 4
    for size in sizes:
        x = images(2, *size).double()
        assert relative(fused(x), model(x)) < 1e-12


def test_a_fused_swin_says_that_its_windows_are_settled(timm):
    fused = repavit_ops.fuse(build(timm, "swin_tiny_patch4_window7_224"))
    with pytest.raises(RuntimeError, match="set_input_size on the unfused model, then fuse"):
        fused.set_input_size((112, 112))


# --- what must not be fused -------------------------------------------------------------------------------------------


def unfused_reason(model, name="blocks.0.attn"):
    report = repavit_ops.fusion_report(repavit_ops.fuse(model))
    return next(entry.note for entry in report.skipped if entry.name == name)


def test_qk_norm_fuses_unless_it_is_two_norms(timm):
    model = build(timm, qk_norm=True)
    fused = repavit_ops.fuse(model)
    assert isinstance(fused.blocks[0].attn, RepAttention)
    assert relative(fused(images()), model(images())) < 1e-5
    for block in model.blocks:
        block.attn.k_norm.eps = 1e-2
    assert "QK-norm" in unfused_reason(model)
    fused = repavit_ops.fuse(model)
    assert isinstance(fused.blocks[0].mlp, PartialGELUFFN)
    assert relative(fused(images()), model(images())) < 1e-5
    with pytest.raises(RuntimeError, match=r"strict=True.*QK-norm"):
        repavit_ops.fuse(model, strict=True)


def test_whatever_a_rule_does_not_know_is_named(timm):
    model = build(timm)
    model.blocks[0].attn.sink = nn.Parameter(torch.zeros(3))
    model.blocks[1].mlp.temperature = 2.0
    assert "also holds sink" in unfused_reason(model)
    assert "also holds temperature" in unfused_reason(model, "blocks.1.mlp")
    del model.blocks[1].mlp.drop1
    assert "lacks drop1" in repavit_ops.can_fuse(model.blocks[1].mlp)


def test_hooks_adapters_and_replaced_forwards_are_left_alone(timm):
    model, x = build(timm), images()
    seen = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    model.blocks[1].attn.qkv.register_forward_pre_hook(lambda *_: seen.append("qkv"))
    nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc1)
    fused = repavit_ops.fuse(model)
    reasons = {entry.name: entry.note for entry in repavit_ops.fusion_report(fused).skipped}
    assert "hooks" in reasons["blocks.0"]
    assert "hooks" in reasons["blocks.1.attn"]
    assert "ParametrizedLinear" in reasons["blocks.1.mlp"]
    assert relative(fused(x), model(x)) < 1e-5
    assert seen == ["block", "qkv"] * 2

    model = build(timm)
    attention = model.blocks[0].attn
    attention.forward = lambda x, **_: torch.zeros_like(x)
    assert "replaced" in unfused_reason(model)
    assert relative(repavit_ops.fuse(model)(x), model(x)) < 1e-5


def test_subclasses_are_not_touched(timm):
    class Doubled(timm.layers.Mlp):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = build(timm, mlp_layer=Doubled), images()
    fused = repavit_ops.fuse(model)
    assert isinstance(fused.blocks[0].mlp.body, Doubled)
    assert relative(fused(x), model(x)) < 1e-5


def test_layernorms_over_other_dimensions_are_not_taken_for_layernorm(timm):
    model = build(timm)
    model.blocks[0].norm2 = timm.layers.LayerNorm2d(48).eval()
    assert "without norm (LayerNorm2d)" in unfused_reason(model, "blocks.0.mlp")


@torch.no_grad()
@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_224"])
def test_blocks_with_rotary_embedding_are_one_call(timm, name):
    side = FAMILIES[name][1]
    model = build(timm, name)
    fused, x = repavit_ops.fuse(model), images(2, side)
    blocks = fused.blocks
    assert isinstance(blocks, LoopedBlocks)
    together = fused(x)
    assert blocks._routes
    torch.testing.assert_close(together, model(x), rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        apart = fused(x.clone().requires_grad_())
    torch.testing.assert_close(together, apart.detach(), rtol=0, atol=0)
    other = images(2, side).flip(0)
    torch.testing.assert_close(fused(other), model(other), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tables_of_each_block_keep_the_blocks_apart(timm):
    fused = repavit_ops.fuse(build(timm, "vit_small_patch16_rope_mixed_ape_224"))
    assert type(fused.blocks) is nn.ModuleList
