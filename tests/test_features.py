"""Our models as backbones: timm's methods for features, sizes and checkpointing, with timm's answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_helpers import images, randomise, relative
from torch import Tensor, nn

import repavit_ops
from repavit_ops.models import FeatureExtractor, JoinedVisionTransformer, create_model

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
NAMES = {  # family → (our name, timm's, arguments of both, further ones of ours)
    "vit": ("vanilla_vit_tiny", "vit_tiny_patch16_224", VIT, {}),
    "swin": ("vanilla_swin_tiny", "swin_tiny_patch4_window7_224", SWIN, {}),
}
FORMS = {"plain": lambda model: model, "merged": repavit_ops.reparameterize, "fused": repavit_ops.fuse}
VIT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"indices": 2, "intermediates_only": True},
    {"indices": [2, 0], "norm": True, "output_fmt": "NLC"},
    {"indices": [-3], "stop_early": True, "return_prefix_tokens": True},
    {"indices": [1], "output_dict": True, "return_prefix_tokens": True},
    {"indices": [1], "output_dict": True, "intermediates_only": True},
]
SWIN_OPTIONS: list[dict[str, Any]] = [
    {},
    {"indices": [1, 0], "norm": True, "intermediates_only": True},
    {"indices": [0], "stop_early": True},
]


def pair_of_models(timm: Any, family: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours with the same weights, in float64."""
    ours, theirs, config, own = NAMES[family]
    truth = randomise(timm.create_model(theirs, **config, **options)).double()
    model = timm.create_model(ours, **config, **own, **options).double().eval()
    model.load_state_dict({renamed(key): value for key, value in truth.state_dict().items() if kept(key)})
    return truth, model


def renamed(key: str) -> str:
    """timm's name of a weight → ours."""
    vit = key.removeprefix("model.").startswith("blocks.")
    key = key.replace(".norm1.", ".attn.norm.") if vit else key
    key = key.replace(".norm2.", ".mlp.norm.").replace("head.fc.", "head.").replace("layers_", "model.layers.")
    if key.startswith("patch_embed.") and key.split(".")[1] in ("proj", "norm"):
        return key
    return key.replace("layers.1.downsample", "layers.0.downsample")  # timm merges in front of a stage


def kept(key: str) -> bool:
    return not key.endswith(("relative_position_index", "attn_mask"))


def flat(answer: Any) -> list[Tensor]:
    """The tensors of nested lists, pairs and dictionaries, in one order."""
    if isinstance(answer, Tensor):
        return [answer]
    parts = [answer[key] for key in sorted(answer)] if isinstance(answer, dict) else answer
    return [tensor for part in parts for tensor in flat(part)]


def assert_same(ours: Any, theirs: Any, bound: float = 1e-12) -> None:
    assert type(ours) is type(theirs)
    assert not isinstance(ours, dict) or ours.keys() == theirs.keys()
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "options"), [("vit", VIT_OPTIONS), ("swin", SWIN_OPTIONS)], ids=["vit", "swin"])
def test_forward_intermediates_answers_as_timm_does(timm, family, options, form):
    truth, model = pair_of_models(timm, family)
    model, x = FORMS[form](model), images(2, 32).double()
    with torch.no_grad():
        for option in options:
            assert_same(model.forward_intermediates(x, **option), truth.forward_intermediates(x, **option))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", NAMES)
def test_features_only_answers_as_timm_does(timm, family, form):
    x = images(2, 32).double()
    for options in ({}, {"out_indices": (0, 1)}, {"out_indices": (-2,), "feature_cls": "getter"}):
        ours, theirs, config, own = NAMES[family]
        truth = randomise(timm.create_model(theirs, features_only=True, **config, **options)).double()
        model = timm.create_model(ours, features_only=True, **config, **own, **options).double().eval()
        assert isinstance(model, FeatureExtractor)
        source = {renamed(key): value for key, value in truth.state_dict().items() if kept(key)}
        if not hasattr(truth, "model"):  # timm's list of stages has no prefix
            source = {key if key.startswith("model.") else f"model.{key}": value for key, value in source.items()}
        missing, unexpected = model.load_state_dict(source, strict=False)
        assert not missing
        assert not [key for key in unexpected if not key.startswith("model.norm.")]
        with torch.no_grad():
            assert_same(FORMS[form](model)(x), truth(x))
        for question in ("channels", "reduction"):
            assert getattr(model.feature_info, question)() == getattr(truth.feature_info, question)()
        assert len(model.feature_info) == len(truth.feature_info)
        assert model.output_fmt == truth.output_fmt


@pytest.mark.parametrize("name", ["repa_deit_tiny", "repa_swin_tiny", "repa_lvvit_s"])
def test_merged_and_fused_features_are_those_of_the_training_form(name):
    config = {"act_channels": 48, **(SWIN if "swin" in name else VIT)}
    model = randomise(create_model(name, features_only=True, out_indices=(0, 1), **config)).double()
    x = images(2, 32).double()
    with torch.no_grad():
        expected = model(x)
        for form in ("merged", "fused"):
            assert_same(FORMS[form](model)(x), expected, 1e-10)


def test_a_backbone_holds_nothing_behind_its_last_map():
    vit = create_model("repa_deit_tiny", features_only=True, out_indices=(0, 1), **VIT)
    assert len(vit.model.blocks) == 2
    swin = create_model("repa_swin_tiny", features_only=True, out_indices=(0,), output_fmt="NCHW", **SWIN)
    for model, shape in ((vit, (2, 48, 4, 4)), (swin, (2, 24, 16, 16))):
        maps = model(images())
        assert maps[-1].shape == shape
        sum(found.sum() for found in maps).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert vit.feature_info.module_name() == ["blocks.0", "blocks.1"]
    assert vit.feature_info.get_dicts(["num_chs"], 0) == {"num_chs": 48}


def test_a_joined_backbone_counts_its_training_steps(monkeypatch):
    model = JoinedVisionTransformer(branches=2, **VIT)
    counted: list[int] = []
    monkeypatch.setattr(JoinedVisionTransformer, "begin_forward", lambda _: counted.append(1))
    for forward in (model, model.forward_features, model.forward_intermediates, FeatureExtractor(model, (0, 1))):
        forward(images())
    assert len(counted) == 4


def test_a_merged_joined_model_runs_in_one_call():
    model = randomise(JoinedVisionTransformer(branches=2, join_steps=10, **VIT))
    repavit_ops.set_join(model, 1.0)
    fused = repavit_ops.fuse(model)
    assert fused.why_apart() is None or "C++" in fused.why_apart()
    with torch.no_grad():
        assert relative(fused(images()), model(images())) < 1e-5


@pytest.mark.parametrize("family", NAMES)
def test_checkpointed_blocks_compute_again_and_give_the_same_gradients(timm, family):
    truth, model = pair_of_models(timm, family)
    x = images(2, 32).double()
    assert checkpointed(truth, x) == len(blocks_of(truth))
    for each in (model, repavit_ops.fuse(model)):
        each.set_grad_checkpointing(False)
        plain = copy.deepcopy(each)
        plain(x).square().sum().backward()
        assert checkpointed(each, x) == len(blocks_of(each))
        for (name, a), b in zip(each.named_parameters(), plain.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name  # of padding, where there is none
            assert a.grad is None or relative(a.grad, b.grad) < 1e-12, name
    model.forward_intermediates(x, intermediates_only=True)[0].sum().backward()
    extractor = create_model(NAMES[family][0], features_only=True, **NAMES[family][2])
    extractor.set_grad_checkpointing()
    assert checkpointed(extractor, images()) == len(blocks_of(extractor))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "attn") and hasattr(m, "mlp")]


def checkpointed(model: nn.Module, x: Tensor) -> int:
    """How many more blocks run in the backward pass than forward, with checkpointing."""
    runs: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda *_: runs.append(1)) for block in blocks_of(model)]
    model.set_grad_checkpointing()
    model.train()
    out = model(x)
    forward = len(runs)
    sum(t.square().sum() for t in flat(out)).backward()
    for hook in hooks:
        hook.remove()
    return len(runs) - forward


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", NAMES)
def test_dynamic_image_sizes_as_in_timm(timm, family, form):
    truth, model = pair_of_models(timm, family, dynamic_img_size=True)
    model = FORMS[form](model)
    with torch.no_grad():
        for size in ((32, 32), (48, 64)):  # of whole windows: where maps are padded, timm differs from the authors
            x = images(1, *size).double()
            bound = 1e-12 if size == (32, 32) or family == "swin" else 1e-5  # timm resamples positions in float32
            assert_same(model(x), truth(x), bound)
    strict = FORMS[form](create_model(NAMES[family][0], dynamic_img_size=False, **NAMES[family][2]).eval())
    with torch.no_grad():
        strict(images())
        for call in (strict, strict.forward_features, strict.forward_intermediates):
            with pytest.raises(ValueError, match=r"got images of 48x32, wanted 32x32.*dynamic_img_size=True"):
                call(images(2, 48, 32))


def test_what_cannot_be_had_is_said():
    with pytest.raises(RuntimeError, match="no weights are published under this name; load a checkpoint"):
        create_model("repa_deit_tiny", pretrained=True)
    with pytest.raises(ValueError, match="add features_only=True"):
        create_model("repa_deit_tiny", out_indices=(1,))
    with pytest.raises(ValueError, match="output_fmt: got 'NLC', wanted one of NCHW, NHWC"):
        create_model("vanilla_swin_tiny", features_only=True, output_fmt="NLC", **SWIN)
    model = create_model("vanilla_vit_tiny", **VIT)
    with pytest.raises(ValueError, match="output_fmt: got 'NHWC', wanted one of NCHW, NLC"):
        model.forward_intermediates(images(), output_fmt="NHWC")
    with pytest.raises(ValueError, match="indices: got none"):
        model.forward_intermediates(images(), [])
