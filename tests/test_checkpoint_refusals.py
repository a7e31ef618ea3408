"""Checkpoints that are refused: damaged, malicious, ambiguous or contradictory ones, each with what to do about it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import VIT, authors_state, image_of, make
from safetensors.torch import save_file
from torch import nn

from repavit_ops import fusing
from repavit_ops.checkpoints import load_checkpoint, save_checkpoint
from repavit_ops.models import LVViT, VisionTransformer


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


# --- several files, and what stands for a file ------------------------------------------------------------------------


def sharded(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """The state dict in two safetensors files and their index."""
    keys = sorted(state)
    names = {key: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: state[key].contiguous() for key in keys if names[key] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": names}))
    return index


def test_shards_load_by_their_index(tmp_path):
    model = make("vit", "training")
    index = sharded(model.state_dict(), tmp_path)
    loaded = load_checkpoint(index, num_heads=3, idle_ratio=0.75)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with pytest.raises(ValueError, match="ema"):
        load_checkpoint(index, num_heads=3, idle_ratio=0.75, ema=True)


def test_one_shard_of_two_says_what_to_pass(tmp_path):
    index = sharded(make("vit", "training").state_dict(), tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    with pytest.raises(ValueError, match=r"shard 2 of 2.*pass their index, model\.safetensors\.index\.json$"):
        load_checkpoint(shard, num_heads=3)
    index.unlink()
    with pytest.raises(ValueError, match=r"shard 2 of 2.*which is not in its folder"):
        load_checkpoint(shard, num_heads=3)


def test_an_index_without_its_shards_names_them(tmp_path):
    index = sharded(make("vit", "training").state_dict(), tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without 1 of its 2 shards: model-00001-of-00002\.safetensors; put"):
        load_checkpoint(index, num_heads=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no JSON"),
        (b"[" * 200_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "no index"),
        (b'{"weight_map": {}}', "no index"),
        (b'{"weight_map": {"a": 3}}', "no index"),
        (b'{"weight_map": {"a": "../a.safetensors"}}', "beside the index"),
        (b'{"weight_map": {"a": "/a.safetensors"}}', "beside the index"),
        (b'{"weight_map": {"a": "a.pth"}}', "beside the index"),
    ],
)
def test_a_damaged_or_hostile_index_is_refused(tmp_path, content, message):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(index)


def test_shards_of_another_model_are_refused(tmp_path):
    index = sharded(make("vit", "training").state_dict(), tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"differs from its index in \d+ keys"):
        load_checkpoint(index, num_heads=3)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged safetensors"):
        load_checkpoint(index, num_heads=3)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".safetensors.index.json"])
def test_a_git_lfs_pointer_says_how_to_fetch_the_file(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 344000000\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer of \d+ bytes.*git lfs pull"):
        load_checkpoint(path)
