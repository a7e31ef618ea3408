"""Models: the published architectures, any image size, both forms, and the names timm sees."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repavit_ops.models import (
    JoinedVisionTransformer,
    LVViT,
    SwinTransformer,
    VisionTransformer,
    create_model,
    linear_idle_ratios,
    list_models,
)
from repavit_ops.models.position import resample_position
from repavit_ops.models.schedule import block_act_channels, drop_path_rates
from repavit_ops.models.swin import PatchMerging
from repavit_ops.nn import FFN, ChannelIdleFFN, PartialGELUFFN, set_join

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
TINY_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 3),
    "window_size": 4,
    "num_classes": 5,
}
FAMILIES = [
    pytest.param(VisionTransformer, TINY_VIT, id="vit"),
    pytest.param(LVViT, TINY_VIT, id="lvvit"),
    pytest.param(SwinTransformer, TINY_SWIN, id="swin"),
]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random affines, biases and BatchNorm statistics, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name.endswith("alpha"):
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise.abs() + 0.1 if name.endswith("running_var") else tensor + 0.2 * noise)
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the published architectures ------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("name", ["vit_idle075", "vit_idle050", "swin_idle075"])
def test_training_form_has_the_keys_and_the_output_of_the_authors(name: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = GOLDEN / f"{name}.train.safetensors"
    if not path.exists():
        pytest.skip("the authors' vectors are not beside this checkout")
    with safetensors.safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with safetensors.safe_open(GOLDEN / f"{name}.io.safetensors", "pt") as file:
        x, truth = file.get_tensor("input"), file.get_tensor("logits_fp64")
    family = {"vit": VisionTransformer, "swin": SwinTransformer}[config.pop("family")]
    for key in ("feature_norm", "channel_idle", "fc_norm"):
        config.pop(key, None)
    model = family(**config).eval()
    model.load_state_dict({k: v for k, v in state.items() if not k.endswith(("relative_position_index", "attn_mask"))})
    with torch.no_grad():
        assert (model(x) - truth).abs().max() < 2e-5
        assert (model.double()(x.double()) - truth).abs().max() < 1e-12


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (16, 24)])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_vanilla_vit_equals_timm(timm: types.ModuleType, pre_norm: bool, size: tuple[int, int]) -> None:
    theirs = randomise(timm.models.VisionTransformer(**TINY_VIT, pre_norm=pre_norm, dynamic_img_size=True))
    ours = VisionTransformer(**TINY_VIT, pre_norm=pre_norm, block_norm_eps=1e-6).double().eval()
    renamed = {
        k.replace(".norm1.", ".attn.norm.").replace(".norm2.", ".mlp.norm."): v for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)
    x = images(2, 3, *size)
    tolerance = 1e-9 if size == (32, 32) else 1e-5  # timm resamples positions in float32, we in float64
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [32, 64])
def test_vanilla_swin_equals_timm(timm: types.ModuleType, size: int) -> None:
    theirs = timm.models.SwinTransformer(**(TINY_SWIN | {"img_size": size}))
    theirs = randomise(theirs)
    ours = SwinTransformer(**TINY_SWIN).double().eval()  # built for 32: another size must not need another model
    state = {}
    for key, value in theirs.state_dict().items():
        key = key.replace(".norm2.", ".mlp.norm.").replace("head.fc.", "head.")
        if "layers.1.downsample" in key:
            key = key.replace("layers.1.", "layers.0.")  # timm merges in front of a stage
        if not key.endswith(("relative_position_index", "attn_mask")):
            state[key] = value
    ours.load_state_dict(state)
    x = images(2, 3, size, size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_lvvit_adds_half_the_strongest_token_logits() -> None:
    model = randomise(LVViT(**TINY_VIT, idle_ratio=0.5))
    x = images(2, 3, 32, 32)
    logits, token_logits = model.forward_dense(x)
    assert token_logits.shape == (2, 16, 5)
    torch.testing.assert_close(model(x), logits + 0.5 * token_logits.max(dim=1).values)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 24)
    assert model.blocks[0].attn.qkv.bias is None
    assert model.blocks[0].mlp.skip_lam == model.blocks[0].attn.skip_lam == 2


def test_clip_head_projects_the_class_token_and_dino_has_none() -> None:
    with torch.device("meta"):
        clip, dino = create_model("repa_clip_vit_b32"), create_model("repa_dino_vit_s")
    assert clip.head.weight.shape == (512, 768)
    assert clip.head.bias is None
    assert clip.patch_embed.proj.bias is None
    assert isinstance(dino.head, nn.Identity)
    assert dino(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 384)


@pytest.mark.parametrize("branches", [2, 3])
def test_joined_vit_takes_the_join_coefficient(branches: int) -> None:
    model = randomise(JoinedVisionTransformer(branches=branches, **TINY_VIT))
    x = images(2, 3, 32, 32)
    apart = model(x)
    assert set_join(model, 1.0) == 6
    assert not torch.allclose(model(x), apart)
    with pytest.raises(ValueError, match="form: got 'deployed'"):
        JoinedVisionTransformer(branches=2, **TINY_VIT, idle_ratio=0.5, form="deployed")


# --- idle channels and forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize("idle", [0.75, 0.0, 1.0, "per block"])
def test_deployed_form_takes_the_merged_weights(family: Any, config: dict, idle: Any) -> None:
    depth = sum(config["depths"]) if "depths" in config else config["depth"]
    ratio = linear_idle_ratios(0.75, depth) if idle == "per block" else idle
    training = randomise(family(**config, idle_ratio=ratio))
    deployed = family(**config, idle_ratio=ratio, form="deployed").double().eval()
    assert not any(isinstance(module, ChannelIdleFFN) for module in deployed.modules())
    x = images(2, 3, 32, 32)
    truth = training(x)
    for name, module in list(training.named_modules()):
        if isinstance(module, ChannelIdleFFN):
            training.set_submodule(name, module.fuse())
    deployed.load_state_dict(training.state_dict())
    torch.testing.assert_close(deployed(x), truth, rtol=1e-10, atol=1e-10)


def test_vanilla_is_the_default_and_has_no_deployed_form() -> None:
    model = VisionTransformer(**TINY_VIT)
    assert all(isinstance(block.mlp, FFN) for block in model.blocks)
    with pytest.raises(ValueError, match="form: got 'deployed' for a vanilla model; give idle_ratio or act_channels"):
        VisionTransformer(**TINY_VIT, form="deployed")
    with pytest.raises(ValueError, match="form: got 'fused', wanted one of training, deployed"):
        VisionTransformer(**TINY_VIT, idle_ratio=0.5, form="fused")


def test_shortcut_stays_an_addition_where_no_channel_is_idle() -> None:
    model = VisionTransformer(**TINY_VIT, act_channels=[0, 24, 96], form="deployed")
    kinds = [(block.mlp.act_channels, block.mlp.w_merged is not None, block.mlp.residual) for block in model.blocks]
    assert kinds == [(0, True, False), (24, True, False), (96, False, True)]
    assert all(isinstance(block.mlp, PartialGELUFFN) and block.mlp.backend == "reference" for block in model.blocks)


def test_lvvit_counts_active_channels_without_the_float_trap() -> None:
    with torch.device("meta"):
        model = create_model("repa_lvvit_s")
        trapped = create_model("repa_lvvit_s", idle_ratio=2 / 3)
    assert {block.mlp.act_channels for block in model.blocks} == {384}
    assert {block.mlp.act_channels for block in trapped.blocks} == {385}


def test_linear_schedule_is_the_authors() -> None:
    assert linear_idle_ratios(0.75, 5) == pytest.approx([0.625, 0.75, 0.875, 1.0, 0.0])
    assert linear_idle_ratios(0.75, 1) == [0.0]
    with pytest.raises(ValueError, match=r"idle_ratio: got 0.25, whose linear schedule"):
        linear_idle_ratios(0.25, 12)


def test_per_block_channels() -> None:
    assert block_act_channels([8, 16], 0.75, None) == [2, 4]
    assert block_act_channels([8, 16], [0.5, 1.0], None) == [4, 0]
    assert block_act_channels([8, 16], None, 8) == [8, 8]
    assert block_act_channels([8, 16], None, None) == [None, None]
    with pytest.raises(ValueError, match=r"idle_ratio, act_channels: got 0.5 and 4, wanted at most one"):
        block_act_channels([8], 0.5, 4)
    with pytest.raises(
        ValueError, match=r"idle_ratio: got 3 values, wanted one number or one for each of the 2 blocks"
    ):
        block_act_channels([8, 16], [0.5, 0.5, 0.5], None)
    with pytest.raises(ValueError, match=r"act_channels: got 17 in block 1, wanted 0 <= m <= hidden = 16"):
        block_act_channels([8, 16], None, [8, 17])


def test_drop_path_rises_linearly_and_sleeps_in_evaluation() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.0]
    for family, config in ((VisionTransformer, TINY_VIT), (SwinTransformer, TINY_SWIN)):
        model = family(**config, drop_path_rate=0.9)
        blocks = [m for m in model.modules() if isinstance(getattr(m, "mlp", None), FFN)]
        assert [block.mlp.drop_path for block in blocks] == drop_path_rates(0.9, len(blocks))
        assert getattr(blocks[-1].attn, "drop_path", getattr(blocks[-1], "drop_path", None)) == 0.9
        x = torch.randn(4, 3, 32, 32)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


# --- image sizes and features ---------------------------------------------------------------------------------------


def test_vit_refuses_a_size_that_patches_do_not_divide() -> None:
    model = VisionTransformer(**TINY_VIT)
    with pytest.raises(ValueError, match=r"x: got images of 30x40, .* patch size 8; resize or pad them, e.g. to 32x40"):
        model(torch.randn(1, 3, 30, 40))
    with pytest.raises(ValueError, match="img_size: got 30x30, wanted positive multiples of the patch size 8"):
        VisionTransformer(**(TINY_VIT | {"img_size": 30}))
    with pytest.raises(ValueError, match=r"x: got shape \(3, 32, 32\), wanted images"):
        model(torch.randn(3, 32, 32))


def test_set_input_size_resamples_once_and_for_all() -> None:
    model = randomise(VisionTransformer(**TINY_VIT))
    x = images(1, 3, 48, 64)
    truth = model(x)
    model.set_input_size((48, 64))
    assert model.pos_embed.shape == (1, 1 + 6 * 8, 24)
    assert torch.equal(model(x), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resampled_positions_keep_the_class_token_and_constants(dtype: torch.dtype) -> None:
    pos = torch.randn(1, 1 + 12, 5, dtype=dtype)
    out = resample_position(pos, (3, 4), (7, 5))
    assert out.shape == (1, 1 + 35, 5)
    assert out.dtype is dtype
    assert torch.equal(out[:, 0], pos[:, 0])
    assert resample_position(pos, (3, 4), (3, 4)) is pos
    constant = torch.full((1, 12, 2), 3.0, dtype=dtype)
    torch.testing.assert_close(resample_position(constant, (3, 4), (6, 2), 0), torch.full((1, 12, 2), 3.0, dtype=dtype))
    with pytest.raises(ValueError, match=r"pos_embed: got 13 tokens, wanted 1 \+ 4·4"):
        resample_position(pos, (4, 4), (2, 2))


@pytest.mark.parametrize("size", [(32, 32), (50, 83), (7, 3), (8, 64)])
def test_swin_takes_any_image_size(size: tuple[int, int]) -> None:
    model = randomise(SwinTransformer(**TINY_SWIN, idle_ratio=0.5))
    x = images(2, 3, *size)
    assert model(x).shape == (2, 5)
    first, last = model.forward_intermediates(x, intermediates_only=True)
    h, w = -(-size[0] // 2), -(-size[1] // 2)
    assert first.shape == (2, 12, h, w)
    assert last.shape == (2, 24, -(-h // 2), -(-w // 2))


def test_swin_pads_images_to_whole_patches_with_zeros() -> None:
    model = randomise(SwinTransformer(**TINY_SWIN, idle_ratio=0.5))
    x = images(1, 3, 31, 29)
    assert torch.equal(model(x), model(nn.functional.pad(x, (0, 1, 0, 1))))


def test_patch_merging_pads_odd_maps_with_zeros() -> None:
    merge = randomise(PatchMerging(4, norm_eps=1e-5))
    x = images(2, 5, 7, 4)
    assert torch.equal(merge(x), merge(nn.functional.pad(x, (0, 0, 0, 1, 0, 1))))


def test_swin_window_shrinks_to_a_small_stage_and_then_does_not_shift() -> None:
    model = SwinTransformer(**(TINY_SWIN | {"depths": (2, 2, 2), "num_heads": (2, 3, 3), "window_size": 7}))
    windows = [stage.blocks[0].attn.window for stage in model.layers]
    assert windows == [(7, 7), (7, 7), (4, 4)]  # resolutions 16, 8, 4
    assert [stage.blocks[0].attn.shift for stage in model.layers] == [(0, 0)] * 3
    assert [stage.blocks[1].attn.shift for stage in model.layers][:2] == [(3, 3)] * 2
    small = randomise(SwinTransformer(**(TINY_SWIN | {"img_size": 8})))
    last = small.layers[1].blocks[1].attn
    x = images(1, 2, 2, 24)
    truth = last(x)
    last.shift = (0, 0)
    assert torch.equal(last(x), truth)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_intermediates_are_the_maps_of_forward_features(family: Any, config: dict) -> None:
    model = randomise(family(**config, idle_ratio=0.5))
    x = images(2, 3, 32, 64)
    count = len(model.layers if "depths" in config else model.blocks)
    features, every = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    assert len(every) == count
    chosen = model.forward_intermediates(x, [-1, 0], intermediates_only=True)
    for ours, theirs in zip(chosen, (every[0], every[-1]), strict=True):
        assert torch.equal(ours, theirs)
    (last,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    if "depths" in config:
        assert torch.equal(last, features.permute(0, 3, 1, 2))
    else:
        assert torch.equal(last, features[:, 1:].transpose(1, 2).reshape(2, -1, 4, 8))
    with pytest.raises(ValueError, match=f"indices: got {count}, wanted"):
        model.forward_intermediates(x, [count])
    with pytest.raises(ValueError, match="indices: got the last 0"):
        model.forward_intermediates(x, 0)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_reset_classifier(family: Any, config: dict) -> None:
    model = family(**config).double()
    model.reset_classifier(7)
    assert model(images(2, 3, 32, 32)).shape == (2, 7)
    assert model.get_classifier().weight.dtype is torch.float64
    model.reset_classifier(0)
    assert model(images(2, 3, 32, 32)).shape == (2, model.num_features)
    with pytest.raises(ValueError, match="global_pool: got 'max', wanted one of"):
        model.reset_classifier(7, "max")


def test_average_pooling_leaves_out_the_class_token() -> None:
    model = randomise(VisionTransformer(**TINY_VIT, global_pool="avg"))
    x = images(2, 3, 32, 32)
    tokens = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head(tokens[:, 1:].mean(dim=1)))


# --- names ----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    names = list_models()
    assert len(names) == 32
    for stem in ("deit_tiny", "vit_huge", "swin_base", "lvvit_m", "clip_vit_b16", "dino_vit_s"):
        assert {f"repa_{stem}", f"vanilla_{stem}"} <= set(names)
    assert {"vanilla_vit_tiny", "joined_vit_tiny_6", "joined_vit_tiny_4", "joined_vit_tiny_3"} <= set(names)


def test_unknown_and_impossible_names_are_explained() -> None:
    with pytest.raises(ValueError, match=r"name: got 'repa_deit_tinny'.*close: repa_deit_tiny"):
        create_model("repa_deit_tinny")
    with pytest.raises(ValueError, match="idle_ratio: vanilla_deit_tiny has no idle channels; use repa_deit_tiny"):
        create_model("vanilla_deit_tiny", idle_ratio=0.5)
    with pytest.raises(ValueError, match=r"idle_ratio, act_channels: got 0.5 and 4"):
        create_model("repa_deit_tiny", idle_ratio=0.5, act_channels=4)


def test_huge_has_sixteen_heads_of_eighty() -> None:
    with torch.device("meta"):
        attn = create_model("repa_vit_huge").blocks[0].attn
    assert (attn.num_heads, attn.d_qk) == (16, 80)


# --- timm -----------------------------------------------------------------------------------------------------------

STUB = "import sys, types; sys.modules['torchvision._meta_registrations'] = types.ModuleType('stub')"
ORDERS = {
    "ours_first": "import repavit_ops.models; assert 'timm' not in sys.modules; "
    "import importlib.util; importlib.util.find_spec('timm'); import timm",
    "timm_first": "import timm; import repavit_ops.models",
}


@pytest.mark.parametrize("order", ORDERS)
def test_timm_knows_our_names_whichever_is_imported_first(timm: types.ModuleType, order: str) -> None:
    check = (
        "from repavit_ops.models import list_models, timm_registry; "
        "assert set(list_models()) <= set(timm.list_models()); "
        "assert timm.create_model('repa_deit_tiny', idle_ratio=0.5, num_classes=10).blocks[0].mlp.act_channels == 384; "
        "assert not any(isinstance(f, timm_registry.TimmFinder) for f in sys.meta_path); "
        "assert type(timm.__spec__.loader).__module__ != 'repavit_ops.models.timm_registry'"
    )
    script = "\n".join((STUB, ORDERS[order], check))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:repavit_ops", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert done.returncode == 0, done.stderr


def test_timm_training_script_finds_what_it_touches(timm: types.ModuleType) -> None:
    small = {"img_size": 32, "depth": 2, "embed_dim": 24}
    model = timm.create_model("repa_deit_tiny", num_classes=10, drop_rate=0.0, drop_path_rate=0.1, **small)
    assert (model.num_classes, model.num_features, model.drop_path_rate) == (10, 24, 0.1)
    assert model.pretrained_cfg["architecture"] == "repa_deit_tiny"
    from timm.data import resolve_data_config

    data = resolve_data_config({}, model=model)
    assert data["input_size"] == (3, 224, 224)
    assert {"pos_embed", "cls_token"} == model.no_weight_decay()
    from timm.optim import create_optimizer_v2

    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    with pytest.raises(RuntimeError, match="no weights are published"):
        timm.create_model("repa_deit_tiny", pretrained=True, **small)


def test_timm_layer_groups_follow_the_depth_of_swin(timm: types.ModuleType) -> None:
    model = SwinTransformer(**TINY_SWIN)
    groups = timm.models.group_parameters(model, model.group_matcher())
    order = [next(i for i, names in groups.items() if name in names) for name in dict(model.named_parameters())]
    assert order == sorted(order)
    assert len(groups) == 1 + 4 + 1  # stem, four blocks, head


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_timm_reparameterizes_the_training_form(timm: types.ModuleType, family: Any, config: dict) -> None:
    from timm.utils.model import reparameterize_model

    model = randomise(family(**config, idle_ratio=0.75))
    merged = reparameterize_model(model)
    assert any(isinstance(module, PartialGELUFFN) for module in merged.modules())
    assert not any(isinstance(module, ChannelIdleFFN) for module in merged.modules())
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-10)
