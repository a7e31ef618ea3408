"""torch.fx after fusing: whatever traces before it traces after it, and the graph follows later weights."""

from __future__ import annotations

import importlib
import pickle

import pytest
import torch
from model_helpers import images, randomise
from torch import fx

import repavit_ops

NAMES = (
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "beit_base_patch16_224",
    "deit_tiny_distilled_patch16_224",
)


def timm_model(timm, name):
    size = {"embed_dim": 48, "num_heads": (1, 2, 4, 8) if "swin" in name else 3, "num_classes": 5}
    shape = (
        {"depths": (2, 1, 1, 1), "window_size": 4, "img_size": 64} if "swin" in name else {"depth": 2, "img_size": 64}
    )
    return randomise(timm.create_model(name, **size, **shape))


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_model_traces_and_keeps_its_kernels(timm, name):
    fused, x = repavit_ops.fuse(timm_model(timm, name)), images(2, 64)
    traced = fx.symbolic_trace(fused)
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert {f"{e.name}" for e in repavit_ops.fusion_report(fused).fused} <= set(leaves)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), fused(x), rtol=1e-4, atol=1e-5)
        for p in fused.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(traced(x), fused(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(x), fused(x), rtol=1e-4, atol=1e-5)


def test_masks_reach_the_attention_of_a_traced_model(timm):
    fused, x = repavit_ops.fuse(timm_model(timm, "vit_tiny_patch16_224")), images(2, 64)
    traced = fx.symbolic_trace(fused)
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    with torch.no_grad():
        for arguments in ({"attn_mask": mask}, {"is_causal": True}):
            torch.testing.assert_close(traced(x, **arguments), fused(x, **arguments), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(traced(x), traced(x, is_causal=True))


@pytest.mark.parametrize("name", NAMES[:2])
def test_feature_extractors_of_torchvision(timm, name):
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    model, x = timm_model(timm, name), images(2, 64)
    fused = repavit_ops.fuse(model)
    nodes = ["layers.0", "layers.1"] if "swin" in name else ["blocks.0", "norm"]
    with torch.no_grad():
        ours, theirs = (extraction.create_feature_extractor(m, nodes)(x) for m in (fused, model))
    assert list(ours) == list(theirs) == nodes
    for node in nodes:
        torch.testing.assert_close(ours[node], theirs[node], rtol=1e-4, atol=1e-4)


def test_models_of_torchvision(torchvision_stub):
    pytest.importorskip("torchvision")
    models = importlib.import_module("torchvision.models")
    vit = models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=4)
    swin = models.SwinTransformer([4, 4], 32, [2, 2], [2, 2], [4, 4], num_classes=4)
    for model in map(randomise, (vit, swin)):
        fused, x = repavit_ops.fuse(model), images(2, 32)
        with torch.no_grad():
            torch.testing.assert_close(fx.symbolic_trace(fused)(x), fused(x), rtol=1e-4, atol=1e-5)
