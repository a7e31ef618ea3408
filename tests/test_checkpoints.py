"""Checkpoints: what is saved loads to the same model, and the authors' files load exactly."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import (
    MODELS,
    VIT,
    assert_same_function,
    authors_state,
    image_of,
    make,
    merged,
    randomised,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from repavit_ops import fusing
from repavit_ops.checkpoints import load_checkpoint, save_checkpoint
from repavit_ops.checkpoints.description import build, describe
from repavit_ops.models import JoinedVisionTransformer, LVViT, VisionTransformer
from repavit_ops.nn import ChannelIdleFFN, PartialGELUFFN, RepAttention, set_join

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN_NAMES = ["vit_idle075", "vit_idle050", "swin_idle075"]

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


def test_a_described_fused_attention_is_built_with_all_that_it_does():
    options = {"d_qk": 5, "d_v": 7, "dim_out": 9, "scale": 0.3, "norm_eps": 1e-5, "norm": "rms", "qk_norm_eps": 1e-4}
    options |= {"qk_norm": "rms", "rotary_layout": "interleaved", "inner_norm_eps": 1e-3, "residual": False}
    module = RepAttention(24, 3, **options, backend="reference")
    again = build(describe(module))
    assert again._static() == module._static()
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}


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
