"""Packed models answer bit for bit as what was saved: this library's, timm's, transformers', and the caller's own."""

from __future__ import annotations

import json

import pytest
import torch
from model_helpers import images, randomise, relative, tiny_swin, tiny_vit
from packed_helpers import first_output, fused_and_saved, metadata_of, needs_kernels
from torch import nn

import repavit_ops
from repavit_ops.checkpoints.mapped_file import PACKED
from repavit_ops.fusing.opening import open_ffns
from repavit_ops.models import JoinedVisionTransformer
from repavit_ops.nn import PartialGELUFFN

pytestmark = needs_kernels
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path):
    return fused_and_saved(path)


def without_memory(model):
    return [line for line in str(repavit_ops.fusion_report(model)).splitlines() if not line.startswith("memory")]


def require_same(fused, loaded, x):
    assert torch.equal(first_output(fused, x), first_output(loaded, x))
    assert without_memory(fused) == without_memory(loaded)
    assert [name for name, _ in loaded.named_modules()] == [name for name, _ in fused.named_modules()]
    assert loaded.state_dict().keys() == fused.state_dict().keys()


def joined():
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    model = randomise(JoinedVisionTransformer(**config, branches=3))
    repavit_ops.set_join(model, 1.0)
    return model


OURS = {
    "vit": (tiny_vit, 32),
    "swin": (tiny_swin, 64),
    "padded swin": (tiny_swin, 72),
    "joined": (joined, 32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_a_loaded_model_of_ours_answers_bit_for_bit(name, dtype, path):
    build, size = OURS[name]
    fused = repavit_ops.fuse(build(), dtype=dtype)
    repavit_ops.save_packed(fused, path)
    require_same(fused, repavit_ops.load_packed(path), images(2, size).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_model_in_int8_answers_bit_for_bit_and_its_file_is_smaller(name, dtype, path):
    build, size = OURS[name]
    plain = repavit_ops.fuse(build(), dtype=dtype)
    quantized = repavit_ops.fuse(build(), dtype=dtype, quantize="int8", keep_unpacked=False)
    repavit_ops.save_packed(plain, path)
    before = path.stat().st_size
    repavit_ops.save_packed(quantized, path)
    loaded, x = repavit_ops.load_packed(path), images(2, size).to(dtype)
    require_same(quantized, loaded, x)
    assert not torch.equal(first_output(loaded, x), first_output(plain, x))
    assert path.stat().st_size < 0.8 * before


TIMM = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 32, "num_classes": 7},
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 28},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 24, "img_size": 56},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 28},
    "eva02_base_patch16_clip_224": {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32},
}


@pytest.mark.parametrize("name", TIMM)
def test_a_loaded_model_of_timm_answers_bit_for_bit(timm, name, path):
    fused = repavit_ops.fuse(randomise(timm.create_model(name, **TIMM[name])))
    repavit_ops.save_packed(fused, path, arguments=TIMM[name])
    require_same(fused, repavit_ops.load_packed(path), images(2, TIMM[name]["img_size"]))


def test_what_a_model_of_timm_tells_needs_no_arguments(timm, path):
    fused = repavit_ops.fuse(randomise(timm.create_model("test_vit", num_classes=7, img_size=32)))
    repavit_ops.save_packed(fused, path)
    require_same(fused, repavit_ops.load_packed(path), images(2))
    pooled = repavit_ops.fuse(timm.create_model("test_vit", global_pool="avg").eval())
    with pytest.raises(ValueError, match=r"global_pool is avg, rebuilt as token.*arguments="):
        repavit_ops.save_packed(pooled, path)


def test_an_idled_model_of_timm_keeps_its_channels(timm, path):
    arguments = {"depth": 2, "img_size": 32, "num_classes": 7}
    model = open_ffns(randomise(timm.create_model("vit_tiny_patch16_224", **arguments)))
    for name, m in (("blocks.0.mlp", 96), ("blocks.1.mlp", 33)):
        model.set_submodule(name, PartialGELUFFN(192, m, norm_eps=1e-6, residual=True, backend="reference").eval())
    fused = repavit_ops.fuse(model)
    repavit_ops.save_packed(fused, path, arguments=arguments)
    loaded = repavit_ops.load_packed(path)
    require_same(fused, loaded, images(2))
    assert [block.mlp.act_channels for block in loaded.blocks] == [96, 33]


TRANSFORMERS = {
    "ViTForImageClassification": ("ViTConfig", {**SMALL, "intermediate_size": 96, "num_labels": 7}),
    "Dinov2Model": ("Dinov2Config", SMALL),
    "CLIPVisionModel": ("CLIPVisionConfig", {**SMALL, "intermediate_size": 96}),
    "SwinModel": ("SwinConfig", {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "image_size": 56}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_loaded_model_of_transformers_answers_bit_for_bit(torchvision_stub, name, path):
    transformers = pytest.importorskip("transformers")
    config, arguments = TRANSFORMERS[name]
    model = randomise(getattr(transformers, name)(getattr(transformers, config)(**arguments)))
    fused = repavit_ops.fuse(model)
    repavit_ops.save_packed(fused, path)
    loaded = repavit_ops.load_packed(path)
    require_same(fused, loaded, images(2, arguments["image_size"]))
    assert isinstance(loaded, getattr(transformers, name))
    assert "/" not in json.loads(metadata_of(path)[PACKED])["recipe"]["config"].get("_name_or_path", "")


def encoder(depth=2):
    layer = nn.TransformerEncoderLayer(48, 3, 96, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def test_a_model_that_no_constructor_is_known_for_takes_one(path):
    fused, x = repavit_ops.fuse(randomise(encoder())), torch.randn(2, 5, 48)
    with pytest.raises(ValueError, match=r"TransformerEncoder, which no constructor.*pass build="):
        repavit_ops.save_packed(fused, path)
    repavit_ops.save_packed(fused, path, build=encoder)
    with pytest.raises(ValueError, match="build: got none, wanted the function"):
        repavit_ops.load_packed(path)
    require_same(fused, repavit_ops.load_packed(path, build=encoder), x)
    with pytest.raises(ValueError, match=r"gives another one: layers\.1 is only in the saved one"):
        repavit_ops.save_packed(fused, path, build=lambda: encoder(1))


def test_weights_that_stand_twice_are_stored_once_and_stay_one(path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = tiny_vit()
            self.again = nn.Linear(48, 10)
            self.again.weight = self.trunk.head.weight

        def forward(self, x):
            return self.trunk(x)

    fused = repavit_ops.fuse(Tied().eval())
    repavit_ops.save_packed(fused, path, build=Tied)
    loaded = repavit_ops.load_packed(path, build=Tied)
    assert loaded.again.weight is loaded.trunk.head.weight
    require_same(fused, loaded, images())


def test_weights_that_are_edited_or_loaded_are_those_of_a_model_without_plain_weights(saved):
    fused, path = saved
    loaded = repavit_ops.load_packed(path)
    for key, value in fused.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with pytest.raises(RuntimeError, match="w_in of PartialGELUFFN was freed"):
        loaded.blocks[0].mlp.w_in.add_(1)
    with torch.no_grad():
        loaded.head.bias.add_(1)
    assert relative(first_output(loaded, images()), first_output(fused, images()) + 1) < 1e-5
    other = repavit_ops.fuse(tiny_vit(seed=3))
    loaded.load_state_dict(other.state_dict())
    assert torch.equal(first_output(loaded, images()), first_output(other, images()))
    assert torch.equal(first_output(repavit_ops.load_packed(path), images()), first_output(fused, images()))


def test_edits_behind_a_fused_model_are_in_the_file(path):
    fused = repavit_ops.fuse(tiny_vit())
    fused.blocks[0].mlp.w_in.data[0, 1] += 1  # which no counter and no fingerprint need see
    repavit_ops.save_packed(fused, path)
    loaded = repavit_ops.load_packed(path)
    assert torch.equal(loaded.state_dict()["blocks.0.mlp.w_in"], fused.blocks[0].mlp.w_in)
