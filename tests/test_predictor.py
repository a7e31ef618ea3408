"""One predictor: images as their libraries prepare them, and the answers of the model that it was given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_helpers import randomise, tiny_vit
from predicting_helpers import encoded, photographs

import repavit_ops
from repavit_ops import backends
from repavit_ops.predicting import Predictor, Preprocessing
from repavit_ops.predicting.preprocessing import preprocessing_of

needs_kernels = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


@pytest.fixture
def photos():
    return photographs()


@pytest.fixture
def predictor():
    return Predictor(tiny_vit(), top_k=3, threads=1)


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device: got '{device}', and PyTorch .* sees 0 CUDA GPUs here"):
        Predictor(tiny_vit(), device=device)


def test_devices_that_no_kernel_serves_are_refused():
    with pytest.raises(ValueError, match="device: got 'meta', wanted cpu or cuda"):
        Predictor(tiny_vit(), device="meta")


@needs_kernels
def test_a_packed_file_is_no_model_for_a_gpu(tmp_path, monkeypatch):
    repavit_ops.save_packed(repavit_ops.fuse(tiny_vit()), tmp_path / "packed.safetensors")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"device: got cuda for packed\.safetensors, which is packed for the CPU's"):
        Predictor(tmp_path / "packed.safetensors", device="cuda")


# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "vit_base_patch16_clip_224.openai"]
)
def test_pixels_are_those_of_timms_own_transform(timm, photos, name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)
    ours = preprocessing_of(model)
    for photo in photos:
        pixels = torch.from_numpy(ours.pixels(encoded(photo, "PNG")))[None]
        assert torch.allclose(ours.normalised(pixels, torch.float32)[0], theirs(photo), atol=1e-6)


def test_the_size_that_a_model_was_built_for_wins_over_its_config(timm, photos):
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", img_size=98)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 518, 518)
    assert preprocessing_of(model).size == (98, 98)
    assert preprocessing_of(model).pixels(encoded(photos[0])).shape == (3, 98, 98)


@pytest.mark.parametrize(
    ("processor", "arguments"),
    [
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
        ("BitImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 3}),
    ],
)
def test_pixels_are_those_of_transformers_processors_within_a_level(torchvision_stub, photos, processor, arguments):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, processor)(**arguments)
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL))
    ours = preprocessing_of(model, theirs)
    for photo in photos[:6]:
        expected = theirs(photo, return_tensors="pt")["pixel_values"]
        got = ours.normalised(torch.from_numpy(ours.pixels(encoded(photo, "PNG")))[None], torch.float32)
        assert (got - expected).abs().max() <= 1.01 / 255 / min(ours.std)


def test_a_crop_that_is_not_known_is_refused_by_name(timm):
    model = timm.create_model("test_vit")
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "border"}
    with pytest.raises(ValueError, match=r"crop 'border'.*preprocessing=Preprocessing"):
        preprocessing_of(model)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_predictor_answers_what_its_model_answers(photos):
    model = tiny_vit()
    predictor = Predictor(model, top_k=3, features=True)
    found = predictor({"bytes": [encoded(photo, "PNG") for photo in photos[:4]] + [b""], "id": np.arange(5)})
    pixels = np.stack([predictor.preprocessing.pixels(encoded(photo, "PNG")) for photo in photos[:4]])
    with torch.no_grad():
        x = predictor.preprocessing.normalised(torch.from_numpy(pixels), torch.float32)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        scores, labels = model.head(features).softmax(-1).topk(3)
    assert np.array_equal(found["labels"][:4], labels.numpy())
    assert np.array_equal(found["label"][:4], labels[:, 0].numpy())
    np.testing.assert_allclose(found["scores"][:4], scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["features"][:4], features.numpy(), atol=1e-4)
    assert found["label"][4] == -1
    assert np.isnan(found["features"][4]).all()
    assert list(found["error"]) == [None] * 4 + ["ValueError: the file is empty"]
    assert found["id"].tolist() == list(range(5))


def test_threads_are_set_again_whoever_set_them_meanwhile(predictor):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        predictor.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="threads: got 0"):
        Predictor(tiny_vit(), threads=0)


def test_features_in_half_are_refused_where_they_do_not_fit():
    model = tiny_vit()
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert Predictor(model, features=True, half=True).predict(image)["features"].dtype == np.float16
    with torch.no_grad():
        model.norm.weight.fill_(1e6)
    with pytest.raises(ValueError, match="float16 holds 65504"):
        Predictor(model, features=True, half=True).predict(image)


def test_models_without_classes_give_features_and_others_say_what_they_lack(torchvision_stub):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**SMALL, intermediate_size=96)
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    preprocessing = Preprocessing((32, 32), (36, 36))
    bare = Predictor(randomise(transformers.ViTModel(config)), preprocessing=preprocessing)
    assert bare.predict(image)["features"].shape == (2, 48)
    classes = randomise(transformers.ViTForImageClassification(config))
    assert Predictor(classes, preprocessing=preprocessing).predict(image)["label"].shape == (2,)
    with pytest.raises(ValueError, match=r"does not say how its images are prepared; give processor="):
        Predictor(classes)
    with pytest.raises(ValueError, match="give its base model"):
        Predictor(classes, preprocessing=preprocessing, features=True).predict(image)


def test_a_folder_of_transformers_is_a_model_with_its_processor(torchvision_stub, photos, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, intermediate_size=96)))
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    predictor = Predictor(tmp_path)
    assert predictor.preprocessing.mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        pixels = torch.from_numpy(predictor.preprocessing.pixels(encoded(photos[0])))[None]
        expected = model(predictor.preprocessing.normalised(pixels, torch.float32)).logits.argmax(-1)
    assert predictor.predict(pixels)["label"] == expected.numpy()


@needs_kernels
def test_a_packed_model_of_transformers_takes_its_processor_from_a_folder(torchvision_stub, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, intermediate_size=96)))
    packed, folder = tmp_path / "model.safetensors", tmp_path / "folder"
    folder.mkdir()
    repavit_ops.save_packed(repavit_ops.fuse(model), packed)
    with pytest.raises(ValueError, match="wanted a folder that holds preprocessor_config"):
        Predictor(packed, processor=folder)
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    found = Predictor(packed, processor=folder).preprocessing
    assert (found.size, found.mean) == ((32, 32), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="processor: got one beside preprocessing="):
        Predictor(packed, processor=folder, preprocessing=found)


@pytest.mark.parametrize("name", ["none.safetensors", "no_such_architecture"])
def test_a_model_that_is_not_there_is_named(timm, name):
    with pytest.raises(ValueError, match=f"model: got .*{name}"):
        Predictor(name)
