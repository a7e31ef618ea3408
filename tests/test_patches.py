"""fuse() on patch embeddings and Swin's mergings: exact, with the same keys, and left alone where somebody listens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_helpers import Recorder, images, randomise, relative, tiny_swin, tiny_vit
from torch import nn

import repavit_ops
from repavit_ops.models import LVViT
from repavit_ops.models.lvvit import ConvStem
from repavit_ops.nn import ConvReLU2d, PatchConv2d, PatchProjection
from repavit_ops.nn.patch_conv import is_patch_conv

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}


def tiny_lvvit() -> nn.Module:
    return randomise(LVViT(**{**TINY, "patch_size": 16}, idle_ratio=0.75))


# builder, images' height and width, convolutions and projections after fusing
MODELS = {
    "vit": (tiny_vit, (32, 32), 1, 0),
    "vit_other_size": (tiny_vit, (24, 56), 1, 0),
    "lvvit": (tiny_lvvit, (32, 32), 0, 1),
    "swin": (tiny_swin, (64, 64), 1, 1),
    "swin_odd_maps": (tiny_swin, (52, 76), 1, 1),
}


def only_patches(module: nn.Module, name: str) -> bool:
    """A filter that leaves every block as it is."""
    return "embed" in name or "downsample" in name


@torch.no_grad()
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
def test_projections_are_exact(case):
    build, size, convolutions, projections = case
    model = build().double()
    fused = repavit_ops.fuse(model, filter_fn=only_patches)
    x = images(2, *size).double()
    assert relative(fused(x), model(x)) < 1e-12
    kinds = [type(m) for m in fused.modules()]
    assert (kinds.count(PatchConv2d), kinds.count(PatchProjection)) == (convolutions, projections)


@torch.no_grad()
@pytest.mark.parametrize("pad_to", [(64, 64), (60, 52)], ids=["whole", "odd"])
def test_timm_models_have_the_same_patches(timm, pad_to):
    vit = randomise(timm.create_model("vit_tiny_patch16_224", **TINY))
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(2, 2), img_size=pad_to, num_classes=5
    )
    for model, x in ((vit, images(2, 32)), (randomise(swin), images(2, *pad_to))):
        model, x = model.double(), x.double()
        fused = repavit_ops.fuse(model)
        assert isinstance(fused.patch_embed.proj, PatchConv2d)
        assert relative(fused(x), model(x)) < 1e-12
    assert isinstance(fused.layers[1].downsample, PatchProjection)


@torch.no_grad()
def test_the_convolution_keeps_its_keys_and_its_trainability():
    model = tiny_vit()
    model.patch_embed.requires_grad_(False)
    fused = repavit_ops.fuse(model)
    proj = fused.patch_embed.proj
    assert isinstance(proj, nn.Conv2d)
    torch.testing.assert_close(proj.state_dict(), model.patch_embed.proj.state_dict(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in proj.parameters())
    assert all(p.requires_grad for p in fused.norm.parameters())
    assert proj.weight is not model.patch_embed.proj.weight
    inplace = repavit_ops.fuse(model, inplace=True)
    assert inplace.patch_embed.proj.weight is model.patch_embed.proj.weight


def test_gradients_reach_the_convolution():
    model, x = tiny_vit(), images(2, 32)
    fused = repavit_ops.fuse(model, filter_fn=only_patches)
    for m in (model, fused):
        m(x).sum().backward()
    torch.testing.assert_close(
        fused.patch_embed.proj.weight.grad, model.patch_embed.proj.weight.grad, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_copies_casts_and_loads():
    fused, x = repavit_ops.fuse(tiny_swin()), images(2, 64)
    expected = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
    other = repavit_ops.fuse(tiny_swin(seed=4))
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), expected)
    fused.patch_embed.proj.weight.mul_(2)  # the packed copy follows
    assert not torch.equal(fused(x), expected)
    assert repavit_ops.fuse(fused, dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin], ids=["vit", "swin"])
def test_unpacked_weights_can_go(build):
    x = images(2, 64)
    plain, slim = (repavit_ops.fuse(build(), keep_unpacked=keep) for keep in (True, False))
    assert torch.equal(slim(x), plain(x))
    torch.testing.assert_close(slim.state_dict(), plain.state_dict(), rtol=0, atol=0)
    back = repavit_ops.fuse(slim, backend="reference")
    assert isinstance(back.patch_embed.proj, PatchConv2d)
    torch.testing.assert_close(back(x), plain(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_whoever_listens_keeps_the_convolution():
    model = tiny_vit()
    heard = []
    model.patch_embed.proj.register_forward_hook(lambda *_: heard.append(True))
    fused = repavit_ops.fuse(model)
    fused(images(1, 32))
    assert type(fused.patch_embed.proj) is nn.Conv2d
    assert heard


@pytest.mark.parametrize(
    "change",
    [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"dilation": 2}, {"padding": "same", "stride": 1}],
    ids=lambda change: next(iter(change)),
)
def test_other_convolutions_are_none_over_patches(change):
    assert is_patch_conv(nn.Conv2d(4, 8, 4, 4))
    assert not is_patch_conv(nn.Conv2d(4, 8, 4, **{"stride": 4, **change}))


def test_the_report_names_them():
    report = repavit_ops.fusion_report(repavit_ops.fuse(tiny_swin()))
    names = [entry.name for entry in report.with_status("projected")]
    assert names == ["patch_embed.proj", "layers.0.downsample"]
    assert "patch_projection" in str(report)


# --- LV-ViT's stem ----------------------------------------------------------------------------------------------------

ONEDNN = torch.backends.mkldnn.is_available()
POINTWISE = "mkldnn::_convolution_pointwise"


def operators_of(call):
    """Names of the operators that a call takes."""
    with Recorder() as recorder:
        call()
    return recorder.calls


def stems(dtype=torch.float32):
    """A stem as trained, in float64, and fused."""
    model = tiny_lvvit()
    return model.patch_embed.double(), repavit_ops.fuse(model, dtype=dtype).patch_embed


@torch.no_grad()
@pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_the_stem_is_folded_and_each_convolution_has_its_relu(batch, size, dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    plain, fused = stems(dtype)
    x = images(batch, *size).to(dtype)
    truth = plain(x.double())
    for laid_out in (x, x.to(memory_format=torch.channels_last)):
        ours = fused(laid_out)
        assert ours.shape == truth.shape
        assert ours.dtype == dtype
        if batch:
            assert relative(ours.double(), truth) < (1e-5 if dtype == torch.float32 else 3e-2)
    names = operators_of(lambda: fused(x))
    assert names.count(POINTWISE) == (3 if batch else 0)
    assert "aten::native_batch_norm" not in names


@pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN")
def test_the_stem_is_pytorch_where_one_call_would_not_do():
    _, fused = stems()
    x = images(2, 32)
    with torch.no_grad():
        expected = fused(x)
        for backend in ("reference", "auto"):
            other = repavit_ops.fuse(fused, backend=backend)
            assert (POINTWISE in operators_of(lambda other=other: other(x))) == (backend == "auto")
            assert relative(other(x), expected) < 1e-4
        with torch.autocast("cpu", torch.bfloat16):
            assert POINTWISE not in operators_of(lambda: fused(x))
            assert fused(x).dtype == torch.bfloat16
    fused.requires_grad_(True)
    fused(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fused.parameters())
    compiled = torch.compile(fused.requires_grad_(False), backend="eager", fullgraph=True)
    assert relative(compiled(x), expected) < 1e-4


@torch.no_grad()
def test_a_stem_whose_statistics_are_not_finite_is_refused():
    model = tiny_lvvit()
    model.patch_embed.bn2.running_var.fill_(float("nan"))
    with pytest.raises(ValueError, match="running_var"):
        repavit_ops.fuse(model)


@torch.no_grad()
def test_whoever_listens_keeps_the_stem():
    model = tiny_lvvit()
    model.patch_embed.bn1.register_forward_hook(lambda *_: None)
    assert type(repavit_ops.fuse(model).patch_embed) is ConvStem


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "part"),
    [("bn2", nn.GroupNorm(4, 64)), ("conv2", nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))), ("proj", nn.Identity())],
    ids=["norm", "convolution", "projection"],
)
def test_a_stem_with_other_parts_is_left_alone(name, part):
    model = tiny_lvvit()
    setattr(model.patch_embed, name, part.eval())
    fused, x = repavit_ops.fuse(model, filter_fn=only_patches).patch_embed, images(1, 32)
    assert type(fused) is ConvStem
    assert torch.equal(fused(x), model.patch_embed(x))


@torch.no_grad()
@pytest.mark.parametrize("config", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_other_paddings_are_left_to_pytorch(config):
    conv, x = ConvReLU2d(3, 8, 3, **config), images(1, 32)
    assert torch.equal(conv(x), nn.functional.relu(nn.Conv2d.forward(conv, x)))
