"""What callers of transformers' models see is theirs after fusing: outputs asked for, classes, saving, training."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from coverage import randomise
from coverage_more import ROWS
from model_helpers import Recorder, images, relative

import repavit_ops
from repavit_ops import backends

transformers = pytest.importorskip("transformers")
needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
ENCODERS = ("ViT", "DINOv2", "CLIP vision", "SigLIP vision", "Swin", "BEiT")


@pytest.fixture(autouse=True)
def _stub(torchvision_stub):
    transformers.logging.set_verbosity_error()


def pair(name, dtype=torch.float32):
    """A row's model, the fused one, and images for both."""
    model = randomise(ROWS[name].build(False)).to(dtype)
    (x, *_), _ = ROWS[name].inputs(False)
    return model, repavit_ops.fuse(model), x.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_and_attentions_are_as_the_unfused_model_answers(name):
    model, fused, x = pair(name, torch.float64)
    for options in ({"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}):
        ours, expected = fused(x, **options), model(x, **options)
        assert type(ours) is type(expected)
        if isinstance(expected, tuple):
            assert len(ours) == len(expected)
            continue
        assert list(ours) == list(expected)
        assert ours.get("attentions") == expected.get("attentions")  # SDPA has none: the empty tuple
        for a, b in zip(ours.get("hidden_states") or (), expected.get("hidden_states") or (), strict=True):
            assert relative(a, b) < 1e-12
    for m in (model, fused):
        m.config.output_hidden_states = True
    assert len(fused(x).hidden_states) == len(model(x).hidden_states) > 2


@torch.no_grad()
@needs_cpp
def test_one_call_comes_back_after_hidden_states_were_asked_for():
    _, fused, x = pair("ViT")
    fused(x, output_hidden_states=True)
    with Recorder() as recorder:
        fused(x)
    assert [c.split("::")[1] for c in recorder.calls if "repavit_ops" in c] == ["patch_projection", "fused_blocks"]


@torch.no_grad()
def test_a_model_that_recorded_before_it_was_fused_records_after():
    model, _, x = pair("ViT")
    expected = model(x, output_hidden_states=True).hidden_states
    fused = repavit_ops.fuse(model)
    ours = fused(x, output_hidden_states=True).hidden_states
    assert len(ours) == len(expected)
    assert all(relative(a, b) < 1e-4 for a, b in zip(ours, expected, strict=True))


@torch.no_grad()
def test_eager_attention_keeps_its_maps_and_its_ffns_fuse():
    model, _, x = pair("ViT")
    eager = randomise(type(model)._from_config(model.config, attn_implementation="eager"))
    fused = repavit_ops.fuse(eager)
    report = repavit_ops.fusion_report(fused)
    assert len(report.fused) == 2
    assert all("set_attn_implementation('sdpa')" in entry.note for entry in report.skipped)
    maps = fused(x, output_attentions=True).attentions
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps, eager(x, output_attentions=True).attentions, strict=True))


@torch.no_grad()
def test_maps_that_a_fused_model_lacks_are_not_silently_missing():
    _, fused, x = pair("ViT")
    fused.set_attn_implementation("eager")
    fused(x)
    with pytest.raises(RuntimeError, match="has no attention maps; ask the model for them before fusing"):
        fused(x, output_attentions=True)
    _, fused, x = pair("BLIP")  # whose attention has always returned them
    with pytest.raises(RuntimeError, match="has no attention maps"):
        fused(x, output_attentions=True)


@torch.no_grad()
def test_a_fused_swin_keeps_no_state():
    """SwinLayer in evaluation mode drops its shift for good once an image is small: the next large one is answered
    differently, by 5.6 % here. A fused model answers as one just built."""
    model, _, small = pair("Swin", torch.float64)
    fresh = ROWS["Swin"].build(False).double()
    fresh.load_state_dict(model.state_dict())
    large = images(2, 112, 112).double()
    expected = fresh.eval()(large).last_hidden_state
    model(small)  # sets the shift of the last stage to 0
    assert relative(model(large).last_hidden_state, expected) > 1e-3
    fused = repavit_ops.fuse(model)
    assert relative(fused(large).last_hidden_state, expected) < 1e-12
    fused(small)
    assert relative(fused(large).last_hidden_state, expected) < 1e-12
    with pytest.raises(ValueError, match="wanted no side below the window of 7"):
        fused(images(2, 48, 48).double())
    assert relative(fused(large).last_hidden_state, expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "CLIP vision", "BEiT"])
def test_image_sizes_and_masked_positions(name):
    model, fused, _ = pair(name, torch.float64)
    x = images(2, 48, 64).double()
    options = {} if name == "DINOv2" else {"interpolate_pos_encoding": True}
    try:
        expected = model(x, **options)
    except (RuntimeError, ValueError):
        pytest.skip(f"{name} takes no other image size")
    assert relative(fused(x, **options)[0], expected[0]) < 1e-12
    if "bool_masked_pos" in inspect.signature(type(model).forward).parameters and name == "DINOv2":
        masked = torch.arange(48).expand(2, 48) % 3 == 0
        assert relative(fused(x, bool_masked_pos=masked)[0], model(x, bool_masked_pos=masked)[0]) < 1e-12


def test_classes_signatures_and_settings_stay():
    model, fused, _ = pair("ViT")
    assert isinstance(fused, transformers.ViTModel)
    assert str(type(fused)) == str(type(model))
    assert isinstance(fused.layers[0], type(model.layers[0]))
    assert list(inspect.signature(fused.forward).parameters) == list(inspect.signature(model.forward).parameters)
    assert fused.config is not None


def test_saving_is_refused_with_the_fix(tmp_path):
    model, fused, x = pair("ViT")
    with pytest.raises(RuntimeError, match=r"save_pretrained: this model is fused.*save the model before fusing"):
        fused.save_pretrained(tmp_path / "fused")
    model.save_pretrained(tmp_path / "model")
    again = repavit_ops.fuse(transformers.ViTModel.from_pretrained(tmp_path / "model").eval())
    with torch.no_grad():
        assert torch.equal(again(x)[0], fused(x)[0])


def test_gradients_with_checkpointing_equal_those_without():
    _, fused, x = pair("ViT")
    fused.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        fused.train()
        if checkpointing:
            fused.gradient_checkpointing_enable()
        fused.zero_grad()
        fused(x).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in fused.layers.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_by_the_models_own_method():
    _, fused, x = pair("ViT")
    with torch.no_grad():
        assert fused.half()(x.half()).last_hidden_state.dtype is torch.float16


def test_layers_that_an_adapter_wraps_are_skipped_with_a_reason():
    model, _, x = pair("ViT")

    class Adapter(torch.nn.Linear):
        """Stands for an adapter's layer."""

    attention = model.layers[0].attention
    q = attention.q_proj
    attention.q_proj = Adapter(q.in_features, q.out_features)
    attention.q_proj.load_state_dict(q.state_dict())
    fused = repavit_ops.fuse(model)
    (skipped,) = repavit_ops.fusion_report(fused).skipped
    assert "a projection is Adapter, wanted nn.Linear (merge adapters or dequantise first)" in skipped.note
    with torch.no_grad():
        assert relative(fused(x)[0], model(x)[0]) < 1e-5


@torch.no_grad()
def test_a_pipeline_takes_a_fused_model():
    model, fused, _ = pair("ViT")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    photo = torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = processor(photo, return_tensors="pt")
    assert relative(fused(**pixels)[0], model(**pixels)[0]) < 1e-5
