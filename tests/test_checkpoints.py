"""Checkpoints: what is saved loads to the same model, the authors' files load exactly, everything else is refused."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from repavit_ops import fusing
from repavit_ops.models import JoinedVisionTransformer, LVViT, SwinTransformer, VisionTransformer, linear_idle_ratios
from repavit_ops.models.checkpoints import load_checkpoint, save_checkpoint
from repavit_ops.models.description import describe
from repavit_ops.nn import ChannelIdleFFN, PartialGELUFFN, set_join

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN_NAMES = ["vit_idle075", "vit_idle050", "swin_idle075"]

VIT = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 48, "depth": 3, "num_heads": 3}
SWIN = {
    "img_size": 64,
    "num_classes": 5,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}
MODELS = {
    "vit": lambda: VisionTransformer(**VIT, idle_ratio=0.75),
    "vit_per_block": lambda: VisionTransformer(**VIT, idle_ratio=[1.0, 2 / 3, 0.0]),
    "vit_all_idle": lambda: VisionTransformer(**VIT, idle_ratio=1.0),
    "vit_none_idle": lambda: VisionTransformer(**VIT, idle_ratio=0.0),
    "vit_linear": lambda: VisionTransformer(**VIT | {"depth": 4}, idle_ratio=linear_idle_ratios(0.75, 4)),
    "vit_head80": lambda: VisionTransformer(**VIT | {"embed_dim": 160, "num_heads": 2, "depth": 1}, act_channels=129),
    "vit_plain_oblong": lambda: VisionTransformer(
        **VIT | {"img_size": (32, 48), "num_classes": 0}, idle_ratio=0.5, pre_norm=False, qkv_bias=False, norm_eps=1e-5
    ),
    "vit_odd_ratio": lambda: VisionTransformer(**VIT | {"embed_dim": 45}, mlp_ratio=3.5, idle_ratio=0.6),
    "swin": lambda: SwinTransformer(**SWIN, idle_ratio=0.75),
    "swin_window7": lambda: SwinTransformer(**SWIN | {"img_size": 56, "window_size": 7}, idle_ratio=2 / 3),
    "swin_per_block": lambda: SwinTransformer(**SWIN, idle_ratio=[1.0, 0.5, 0.0, 0.75]),
    "swin_small_maps": lambda: SwinTransformer(**SWIN | {"img_size": 16}, idle_ratio=0.75),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, affines and BatchNorm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("num_batches_tracked", "alpha")):
                continue
            draw = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(0.5 + draw.abs())
            elif value.dim() >= 2:
                value.copy_(draw * value[0].numel() ** -0.5)
            else:
                value.copy_(("norm" in name and name.endswith("weight")) + 0.3 * draw)
    return model.eval()


def merged(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, ChannelIdleFFN):
            model.set_submodule(name, module.fuse())
    return model.eval()


def make(name: str, form: str) -> nn.Module:
    model = randomised(MODELS[name]())
    return merged(model) if form == "deployed" else model


def image_of(name: str) -> dict:
    """What save_checkpoint needs to know beyond the model for the authors' layout."""
    sizes = {"swin": 64, "swin_window7": 56, "swin_per_block": 64, "swin_small_maps": 16}
    return {"img_size": sizes[name]} if name in sizes else {}


def images(model: nn.Module, side: int = 32) -> torch.Tensor:
    if isinstance(model, VisionTransformer):
        size = tuple(n * model.patch_size for n in model.grid_size)
    else:
        size = (64, 64)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_function(got: nn.Module, wanted: nn.Module, tolerance: float = 0.0) -> None:
    x = images(wanted)
    assert not got.training
    difference = (got(x) - wanted(x)).abs().max().item()
    assert difference <= tolerance, difference


def authors_state(model: nn.Module, tmp_path: Path, **options) -> dict[str, torch.Tensor]:
    save_checkpoint(model, tmp_path / "theirs.safetensors", "authors", **options)
    return load_file(tmp_path / "theirs.safetensors")


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", ["native", "authors"])
@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_from_its_file_alone(name, form, layout, suffix, tmp_path):
    model = make(name, form)
    path = tmp_path / f"model{suffix}"
    save_checkpoint(model, path, layout, **(image_of(name) if layout == "authors" else {}))
    loaded = load_checkpoint(path)
    assert type(loaded) is type(model)
    assert_same_function(loaded, model)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("name", ["vit_per_block", "swin"])
@pytest.mark.parametrize("container", ["bare", "model", "state_dict", "ddp", "compiled", "ema", "args", "file"])
def test_every_container_of_an_authors_state_dict_loads(container, name, form, tmp_path):
    model = make(name, form)
    state = authors_state(model, tmp_path, **image_of(name))
    ratios = [1 - mlp.act_channels / (4 * mlp.dim) for _, mlp in blocks_mlps(model)]
    ratio = {"idle_ratio": ratios} if form == "training" else {}
    config = {"num_heads": 3} if name.startswith("vit") else {}
    options: dict = {}
    if container == "bare":
        source = state
    elif container in ("model", "state_dict"):
        source = {container: state, "epoch": 3, "optimizer": {"state": {}}}
    elif container == "ddp":
        source = {"model": {f"module.{key}": value for key, value in state.items()}}
    elif container == "compiled":
        source = {"model": {f"_orig_mod.{key}": value for key, value in state.items()}}
    elif container == "ema":
        zeros = {key: torch.zeros_like(value) for key, value in state.items()}
        source, options = {"model": zeros, "model_ema": state}, {"ema": True}
    else:
        args = argparse.Namespace(
            idle_ratio=ratios, channel_idle=True, feature_norm="BatchNorm", heuristic="static", lr=1e-3, output=None
        )
        source, ratio = {"model": state, "args": args}, {}
        if container == "file":
            torch.save(source, tmp_path / "theirs.pth")
            source = tmp_path / "theirs.pth"
    assert_same_function(load_checkpoint(source, config, **ratio, **options), model)


def blocks_mlps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(".mlp")]


def test_loading_a_dict_copies_it():
    model = make("vit", "training")
    state = model.state_dict()
    loaded = load_checkpoint(state, num_heads=3, idle_ratio=0.75)
    with torch.no_grad():
        loaded.head.weight.zero_()
    assert state["head.weight"].abs().sum() > 0


def test_saving_over_the_file_a_model_came_from(tmp_path):
    path = tmp_path / "model.safetensors"
    model = make("vit", "training")
    save_checkpoint(model, path)
    loaded = load_checkpoint(path)
    save_checkpoint(loaded, path)
    assert_same_function(load_checkpoint(path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype, tmp_path):
    model = make("vit", "training").to(dtype)
    save_checkpoint(model, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert loaded.head.weight.dtype == dtype
    assert loaded.blocks[0].mlp.norm1.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["vit_per_block", "swin", "lvvit", "vanilla", "joined", "joined_merged", "bypassed"])
@pytest.mark.parametrize("fused", [False, True])
def test_native_layout_holds_every_model(name, fused, suffix, tmp_path):
    if name in MODELS:
        model = make(name, "training")
    elif name == "lvvit":
        model = randomised(LVViT(**VIT, act_channels=48))
    elif name == "vanilla":
        model = randomised(VisionTransformer(**VIT, layer_scale=0.1, block_norm_eps=1e-6, global_pool="avg"))
    else:
        model = randomised(JoinedVisionTransformer(**VIT, branches=2))
        if name == "bypassed":
            attn = model.blocks[1].attn
            model.blocks[1].attn = randomised(
                type(attn)(48, 3, 2, join="b", kappa="sum", norm="batchnorm", bypass=True, qkv_bias=False)
            )
        set_join(model, 1.0 if name != "joined" or fused else 0.25)
        model = model if name == "joined" else fusing.reparameterize(model)
    if fused:
        model = fusing.fuse(model, backend="reference")
    path = tmp_path / f"model{suffix}"
    save_checkpoint(model, path)
    loaded = load_checkpoint(path)
    assert describe(loaded) == describe(model)
    assert_same_function(loaded, model)


def test_a_bare_native_state_dict_loads_with_its_description():
    model = make("vit_per_block", "deployed")
    assert_same_function(load_checkpoint(model.state_dict(), {"model": describe(model)}), model)
    with pytest.raises(ValueError, match="does not say where its shortcuts are"):
        load_checkpoint(model.state_dict(), num_heads=3)


def test_authors_layout_of_no_idle_channels_is_the_identity(tmp_path):
    model = make("vit_none_idle", "deployed")
    state = authors_state(model, tmp_path)
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], torch.eye(48))
    mlp = load_checkpoint(state, num_heads=3).blocks[1].mlp
    assert mlp.residual
    assert mlp.w_merged is None
    assert mlp.act_channels == 192


def test_authors_layout_of_all_idle_channels_is_one_linear(tmp_path):
    state = authors_state(make("vit_all_idle", "deployed"), tmp_path)
    names = {key.removeprefix("blocks.0.mlp.") for key in state if key.startswith("blocks.0.mlp.")}
    assert names == {"fc1.weight", "fc1.bias"}


def test_an_explicit_shortcut_is_folded_back_or_refused(tmp_path):
    model = randomised(MODELS["vit"]())
    for block in model.blocks:
        block.mlp = block.mlp.fuse(fold_identity=False)
        assert block.mlp.residual
    folded = authors_state(model, tmp_path)
    for key, value in authors_state(merged(make("vit", "training")), tmp_path).items():
        torch.testing.assert_close(folded[key], value, rtol=0, atol=1e-6)
    assert_same_function(load_checkpoint(folded, num_heads=3), model, tolerance=2e-6)
    with pytest.raises(ValueError, match=r"save model\.float\(\)"):
        save_checkpoint(model.bfloat16(), tmp_path / "low.pth", "authors")


def test_swin_buffers_that_follow_from_the_shapes_may_be_missing(tmp_path):
    model = make("swin_window7", "deployed")
    state = authors_state(model, tmp_path, img_size=56)
    masks = [key for key in state if key.endswith("attn_mask")]
    assert masks == ["layers.0.blocks.1.attn_mask"]  # the second stage's map is one window
    assert state[masks[0]].shape == (4, 49, 49)
    bare = {key: value for key, value in state.items() if not key.endswith(("attn_mask", "relative_position_index"))}
    assert_same_function(load_checkpoint(bare), model)


# --- what the caller says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heuristic", ["static", None, "None", ""])
def test_spellings_of_no_heuristic(heuristic):
    model = make("vit", "training")
    config = {"num_heads": 3, "idle_ratio": 0.75, "heuristic": heuristic, "drop_path_rate": 0.1, "anything": object()}
    assert_same_function(load_checkpoint(model.state_dict(), config), model)


def test_linear_heuristic():
    model = make("vit_linear", "training")
    loaded = load_checkpoint(model.state_dict(), num_heads=3, idle_ratio=0.75, heuristic="linear")
    assert_same_function(loaded, model)
    assert [block.mlp.act_channels for block in loaded.blocks] == [64, 33, 0, 192]  # 192 · (1 - 5/6) is 32.00…01


@pytest.mark.parametrize(("theta", "depth"), [(0.55, 12), (0.65, 4), (2 / 3, 4), (0.75, 12), (0.75, 24), (0.85, 7)])
def test_linear_heuristic_rounds_as_the_authors_do(theta, depth):
    """They divide before they multiply, and a last bit decides between m = 0 and m = 1."""
    step = (2 - 2 * theta) / (depth - 1)
    wanted = [max(math.ceil(192 * (1 - ((2 * theta - 1) + step * k))), 0) for k in range(1, depth)] + [192]
    state = VisionTransformer(**VIT | {"depth": depth}, act_channels=0).state_dict()
    loaded = load_checkpoint(state, num_heads=3, idle_ratio=theta, heuristic="linear")
    assert [block.mlp.act_channels for block in loaded.blocks] == wanted


def test_act_channels_and_nested_ratios():
    model = make("vit_per_block", "training")
    assert_same_function(load_checkpoint(model.state_dict(), num_heads=3, act_channels=[0, 64, 192]), model)
    swin = make("swin_per_block", "training")
    assert_same_function(load_checkpoint(swin.state_dict(), {"idle_ratio": [[1.0, 0.5], [0.0, 0.75]]}), swin)


def test_overrides_win_over_config_and_config_over_the_file():
    model = make("vit", "training")
    args = argparse.Namespace(idle_ratio=0.25, heuristic="linear")
    source = {"model": model.state_dict(), "args": args}
    assert load_checkpoint(source, {"num_heads": 3, "idle_ratio": 0.5}).blocks[0].mlp.act_channels == 96
    loaded = load_checkpoint(source, {"num_heads": 6, "idle_ratio": 0.5}, num_heads=3, act_channels=48)
    assert_same_function(loaded, model)


def test_authors_class_arguments_are_validated():
    state = make("vit", "training").state_dict()
    for name, value in {"feature_norm": "LayerNorm", "channel_idle": False, "fc_norm": True}.items():
        with pytest.raises(ValueError, match=f"^{name}: got {value!r}"):
            load_checkpoint(state, {"num_heads": 3, "idle_ratio": 0.75, name: value})


# --- refusals ---------------------------------------------------------------------------------------------------------


def damaged(name: str, form: str, change, tmp_path: Path) -> dict[str, torch.Tensor]:
    state = authors_state(make(name, form), tmp_path, **image_of(name))
    change(state)
    return state


def test_no_heads_and_no_idle_ratio_say_what_to_pass():
    state = make("vit", "training").state_dict()
    with pytest.raises(ValueError, match=r"num_heads: got nothing.*C = 48.*pass num_heads=h"):
        load_checkpoint(state, idle_ratio=0.75)
    with pytest.raises(ValueError, match=r"idle_ratio: got nothing.*pass idle_ratio="):
        load_checkpoint(state, num_heads=3)
    with pytest.raises(ValueError, match="heuristic: got 'cubic'"):
        load_checkpoint(state, num_heads=3, idle_ratio=0.75, heuristic="cubic")


def test_every_missing_unexpected_and_misshapen_key_is_named_at_once(tmp_path):
    def change(state):
        del state["norm.weight"], state["blocks.1.mlp.fc3.weight"], state["cls_token"]
        state["blocks.0.attn.gamma"] = torch.ones(48)
        state["blocks.2.attn.qkv.weight"] = torch.ones(48, 48)
        state["blocks.0.mlp.fc2.bias"] = torch.ones(3)
        state["norm.bias"] = torch.ones(48, dtype=torch.int64)

    with pytest.raises(ValueError, match="does not fit") as caught:
        load_checkpoint(damaged("vit", "deployed", change, tmp_path), num_heads=3)
    message = str(caught.value)
    for part in (
        "missing 3: ",
        "cls_token",
        "blocks.1.mlp.fc3.weight",
        "norm.weight",
        "unexpected 1: blocks.0.attn.gamma",
        "misshapen 2: ",
        "blocks.2.attn.qkv.weight got [48, 48], wanted [144, 48]",
        "blocks.0.mlp.fc2.bias got [3], wanted [48]",
        "norm.bias",
    ):
        assert part in message, part


@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_any_single_missing_key_is_named(name, form, tmp_path):
    state = authors_state(make(name, form), tmp_path, **image_of(name))
    options = ({"num_heads": 3} if name == "vit" else {}) | ({"idle_ratio": 0.75} if form == "training" else {})
    derived = ("attn_mask", "relative_position_index")
    for key in state:
        rest = {other: value for other, value in state.items() if other != key}
        if key.endswith(derived):
            load_checkpoint(rest, **options)
            continue
        with pytest.raises(ValueError, match="missing 1: ") as caught:
            load_checkpoint(rest, **options)
        assert key in str(caught.value)


@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_any_single_misshapen_key_is_named(name, form, tmp_path):
    state = authors_state(make(name, form), tmp_path, **image_of(name))
    options = ({"num_heads": 3} if name == "vit" else {}) | ({"idle_ratio": 0.75} if form == "training" else {})
    for key, value in state.items():
        if value.dim() == 0:
            continue
        grown = torch.zeros([side + 1 for side in value.shape], dtype=value.dtype)
        with pytest.raises(ValueError, match="got") as caught:
            load_checkpoint({**state, key: grown}, **options)
        assert key in str(caught.value)


def test_many_keys_are_counted():
    state = make("vit", "training").state_dict()
    with pytest.raises(ValueError, match=r"missing 15: .*blocks\.\*\.attn\.norm\.weight \(3 keys\)"):
        load_checkpoint({k: v for k, v in state.items() if ".attn." not in k}, num_heads=3, idle_ratio=0.75)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"depth": 12}, ["depth: got 12", "blocks.2", "means 3"]),
        ({"embed_dim": 64}, ["embed_dim: got 64", "[48, 48]", "means 48"]),
        ({"patch_size": 16}, ["patch_size: got 16", "[48, 3, 8, 8]", "means 8"]),
        ({"num_classes": 10}, ["num_classes: got 10", "head.weight [5, 48]", "means 5"]),
        ({"img_size": 64}, ["img_size: got 64", "pos_embed [1, 17, 48]", "16 patches"]),
        ({"mlp_ratio": 3}, ["mlp_ratio: got 3", "[192, 48]", "means 4"]),
        ({"family": "swin"}, ["family: got 'swin'", "'vit'"]),
        ({"depth": 2, "embed_dim": 32}, ["depth: got 2", "embed_dim: got 32"]),
        ({"num_heads": 5}, ["num_heads: got 5"]),
        ({"act_channels": [1, 2]}, ["act_channels: got 2 values", "3 blocks"]),
        ({"act_channels": 193}, ["act_channels: got 193", "192"]),
    ],
)
def test_contradictions_name_both_sides(change, names):
    config = {"num_heads": 3, "mlp_ratio": 4} | ({} if "act_channels" in change else {"idle_ratio": 0.75}) | change
    with pytest.raises(ValueError, match="got") as caught:
        load_checkpoint(make("vit", "training").state_dict(), config)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"window_size": 7}, ["window_size: got 7", "[4, 4]"]),
        ({"img_size": 128}, ["img_size: got 128", "attn_mask [16, 16, 16]", "256 tokens"]),
        ({"num_heads": [3, 6]}, ["num_heads: got [3, 6]", "[2, 4]"]),
        ({"depths": [2, 6]}, ["depths: got [2, 6]", "[2, 2]"]),
        ({"act_channels": 12}, ["act_channels: got 12", "mlp.fc2.weight", "[24, 24, 48, 48]"]),
        ({"idle_ratio": 0.5, "mlp_ratio": 4}, ["idle_ratio: got 0.5", "[48, 48, 96, 96]", "[24, 24, 48, 48]"]),
    ],
)
def test_swin_contradictions_name_both_sides(change, names, tmp_path):
    state = authors_state(make("swin", "deployed"), tmp_path, img_size=64)
    with pytest.raises(ValueError, match="contradicts") as caught:
        load_checkpoint(state, change)
    for name in names:
        assert name in str(caught.value)


def test_another_windowing_is_refused(tmp_path):
    def change(state):
        state["layers.0.blocks.0.attn.relative_position_index"] += 1

    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.attn\.relative_position_index"):
        load_checkpoint(damaged("swin", "deployed", change, tmp_path))


def test_unknown_and_mixed_states_are_refused(tmp_path):
    training = make("vit", "training").state_dict()
    with pytest.raises(ValueError, match=r"keys of no known model \(layer1\.0"):
        load_checkpoint({"layer1.0.conv.weight": torch.ones(1)})
    vanilla = VisionTransformer(**VIT).state_dict()
    with pytest.raises(ValueError, match=r"no known form in blocks\.0, blocks\.1, blocks\.2"):
        load_checkpoint(vanilla, num_heads=3)
    deployed = authors_state(make("vit", "deployed"), tmp_path)
    mixed = {key: value for key, value in training.items() if not key.startswith("blocks.1.")}
    mixed |= {key: value for key, value in deployed.items() if key.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"training: blocks\.0, blocks\.2; deployed: blocks\.1"):
        load_checkpoint(mixed, num_heads=3, idle_ratio=0.75)
    with pytest.raises(ValueError, match=r"num_head: got an unknown argument.*num_heads"):
        load_checkpoint(training, num_head=3)
    with pytest.raises(ValueError, match="got entries epoch, wanted a state dict under model"):
        load_checkpoint({"epoch": 3})
    with pytest.raises(ValueError, match="pass ema=True"):
        load_checkpoint({"model_ema": training})
    with pytest.raises(ValueError, match="pass ema=False"):
        load_checkpoint(training, ema=True)


def test_native_files_take_no_arguments(tmp_path):
    save_checkpoint(make("vit", "deployed"), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="num_heads: got arguments for a checkpoint that describes its model"):
        load_checkpoint(tmp_path / "model.pth", num_heads=3)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("entry", ["args", "model"])
def test_a_malicious_pickle_is_refused_without_running(entry, tmp_path):
    marker, path = tmp_path / "it_ran", tmp_path / "model.pth"
    torch.save({"model": make("vit", "training").state_dict(), entry: Malicious(marker)}, path)
    with pytest.raises(ValueError, match=r"mkdir.*could run code, so it was refused"):
        load_checkpoint(path, num_heads=3, idle_ratio=0.75)
    assert not marker.exists()


def test_damaged_and_absent_files_are_refused(tmp_path):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(b"these are no tensors")
        with pytest.raises(ValueError, match=f"model{suffix}: got a .*damaged"):
            load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"model\.bin.*\.safetensors, \.pth, \.pt"):
        load_checkpoint(tmp_path / "model.bin")


def test_what_the_authors_layout_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "model.pth"

    def refused(model, match, **options):
        with pytest.raises(ValueError, match=match):
            save_checkpoint(model.eval(), path, "authors", **options)
        assert not path.exists()

    vit = make("vit", "training")
    refused(fusing.fuse(vit, backend="reference"), "RepAttention at blocks.0.attn.*save before fusing")
    refused(VisionTransformer(**VIT), "FFN at blocks.0.mlp")
    refused(LVViT(**VIT, act_channels=48), "LVViT.*layout='native'")
    refused(VisionTransformer(**VIT, idle_ratio=0.75, layer_scale=0.1), "cannot tell.*layer_scale")
    tanh = make("vit", "training")
    tanh.blocks[1].mlp.approximate = "tanh"
    refused(tanh, "blocks.1.mlp.approximate: tanh")
    half = make("vit", "training")
    half.blocks[1].mlp = half.blocks[1].mlp.fuse()
    refused(half, "different forms")
    refused(make("swin", "training"), r"not divisible|wanted one that its windows of 4 divide", img_size=72)
    with pytest.raises(ValueError, match="layout: got 'theirs'"):
        save_checkpoint(vit, path, "theirs")
    with pytest.raises(ValueError, match=r"got a .*Conv2d at .*wanted modules of repavit_ops"):
        save_checkpoint(nn.Sequential(nn.Conv2d(1, 1, 1)), path)


# --- the authors' own vectors -----------------------------------------------------------------------------------------

golden = pytest.mark.golden
with_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the authors' golden vectors are not beside this checkout")


def golden_io(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(GOLDEN / f"{name}.io.safetensors")
    return tensors["input"], tensors["logits_fp64"]


@golden
@with_golden
@torch.no_grad()
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_files_load_and_merge_to_the_authors_logits(name):
    x, logits = golden_io(name)
    training = load_checkpoint(GOLDEN / f"{name}.train.safetensors")
    deployed = load_checkpoint(GOLDEN / f"{name}.deployed.safetensors")
    assert any(isinstance(module, ChannelIdleFFN) for module in training.modules())
    assert any(isinstance(module, PartialGELUFFN) for module in deployed.modules())
    for model in (training, merged(training), deployed):
        assert (model(x).double() - logits).abs().max() <= 2e-5
    assert (training.double()(x.double()) - logits).abs().max() <= 1e-12


@golden
@with_golden
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_our_merge_in_the_authors_layout_is_their_deployed_file(name, tmp_path):
    training = load_checkpoint(GOLDEN / f"{name}.train.safetensors")
    ours = authors_state(merged(training), tmp_path)
    theirs = load_file(GOLDEN / f"{name}.deployed.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5)
    again = authors_state(training, tmp_path)
    source = load_file(GOLDEN / f"{name}.train.safetensors")
    assert again.keys() == source.keys()
    assert all(torch.equal(again[key], value) for key, value in source.items())


@golden
@with_golden
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_states_load_without_their_metadata(name):
    path = GOLDEN / f"{name}.train.safetensors"
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    options = {"idle_ratio": config["idle_ratio"]}
    if config["family"] == "vit":
        options["num_heads"] = config["num_heads"]
    loaded, wanted = load_checkpoint(load_file(path), **options), load_checkpoint(path)
    x, _ = golden_io(name)
    with torch.no_grad():
        assert torch.equal(loaded(x), wanted(x))


def test_save_file_is_read_back_by_safetensors_alone(tmp_path):
    model = make("swin", "deployed")
    save_checkpoint(model, tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    save_file(state, tmp_path / "copy.safetensors")  # shares no storage
