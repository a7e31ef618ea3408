"""Fused models of transformers beside the tools that people use with them: peft, accelerate, pipelines and more."""

from __future__ import annotations

import copy

import pytest
import torch
from coverage import randomise, run
from coverage_more import ROWS
from model_helpers import Recorder, images, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import repavit_ops
from repavit_ops import backends

transformers = pytest.importorskip("transformers")
needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
CONFIG = {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 5}


@pytest.fixture(autouse=True)
def _quiet(torchvision_stub):
    transformers.logging.set_verbosity_error()


def classifier() -> nn.Module:
    return randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**CONFIG)))


def fused_and_skipped(model):
    report = repavit_ops.fusion_report(model)
    return len(report.fused), {entry.name: entry.note for entry in report.skipped}


# --- attention fused alone, in a layer that stays ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("ViT", "layers.0"),
        ("DINOv2", "encoder.layer.0"),
        ("CLIP text", "encoder.layers.0"),
        ("BLIP", "encoder.layers.0"),
        ("BLIP-2", "encoder.layers.0"),
        ("BEiT, shared biases", "layers.0"),
        ("InternVL", "encoder.layer.0"),
        ("RADIO, images in one sequence", "encoder.layer.0"),
    ],
)
def test_a_layer_that_stays_calls_its_fused_attention_as_before(name, layer):
    """Two images: a tensor in place of the pair (output, maps) would be unpacked into one image each."""
    model = randomise(ROWS[name].build(False)).double()
    args, kwargs = ROWS[name].inputs(False)
    expected = run(model, args, kwargs, torch.float64)
    seen = []
    model.get_submodule(layer).register_forward_hook(lambda *_: seen.append(1))
    fused = repavit_ops.fuse(model)
    report = {entry.name: entry.status for entry in repavit_ops.fusion_report(fused).entries}
    alone = [found for found in report if found.startswith(layer) and report[found] == "fused"]
    assert len(alone) == 2
    seen.clear()
    for a, b in zip(run(fused, args, kwargs, torch.float64), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert seen


@torch.no_grad()
def test_attention_alone_refuses_maps_that_it_lacks():
    model = randomise(ROWS["BLIP"].build(False))
    model.encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="BlipAttention is fused and has no attention maps"):
        repavit_ops.fuse(model)(images(2, 32, 32), output_attentions=True)


@torch.no_grad()
def test_cross_attention_of_a_class_that_fuses_elsewhere_stays():
    model = randomise(ROWS["GroupViT"].build(False))
    fused = repavit_ops.fuse(model)
    kept = [m for m in fused.modules() if type(m).__name__ == "GroupViTAttention"]
    assert len(kept) == 2  # those that let group tokens attend to image tokens
    assert relative(fused(images(2, 32, 32))[0], model(images(2, 32, 32))[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("whole_row", [False, True])
def test_masks_in_float32_beside_a_model_in_bfloat16(value, whole_row):
    """SDPA takes them; what is finite in float32 must not become -inf, which means another thing for a whole row."""
    model = randomise(ROWS["CLIP vision"].build(False)).encoder.layers[0].bfloat16()
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.zeros(2, 1, 5, 5)
    mask[..., 3:] = value
    if whole_row:
        mask[:, :, 2] = value
    exact = copy.deepcopy(model).double()(x.double(), mask.double())
    ours, eager = repavit_ops.fuse(model)(x, mask), model(x, mask)
    off, bound = ((y.double() - exact).abs().max() for y in (ours, eager))
    assert off <= 2 * bound + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIP text", "SigLIP text", "X-CLIP text", "open_clip CLIP", "CLIP vision"])
def test_masks_reach_the_operator_without_a_copy_for_every_head(name):
    pytest.importorskip(ROWS[name].library)
    model = repavit_ops.fuse(randomise(ROWS[name].build(False)))
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.repavit_ops.rep_attention.default and args[5] is not None:
                seen.append(args[5])
            return operator(*args, **(kwargs or {}))

    args, kwargs = ROWS[name].inputs(False)
    with Seeing():
        if name == "CLIP vision":  # a mask of truth values for every head, as EoMT makes it
            layer, every_head = model.encoder.layers[0], torch.ones(2, 1, 5, 5, dtype=torch.bool).expand(-1, 3, -1, -1)
            layer(torch.zeros(2, 5, 48), every_head)
        else:
            run(model, args, kwargs, torch.float32)
    assert seen
    assert all(mask.dim() == 2 or mask.stride(1) == 0 or mask.shape[1] == 1 for mask in seen)


# --- peft -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1", "fc2"]], ids=["attention", "ffn"])
def test_adapters_are_skipped_with_a_reason_and_fuse_when_merged(targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(classifier(), config).eval()
    x = images(2, 32, 32)
    expected = model(pixel_values=x).logits
    fused = repavit_ops.fuse(model)
    count, skipped = fused_and_skipped(fused)
    assert count == len(skipped) == 2
    assert all("peft.tuners.lora.layer.Linear, wanted nn.Linear (merge adapters" in why for why in skipped.values())
    assert relative(fused(pixel_values=x).logits, expected) < 1e-5
    merged = repavit_ops.fuse(copy.deepcopy(model).merge_and_unload())
    assert fused_and_skipped(merged) == (4, {})
    assert relative(merged(x).logits, expected) < 1e-5
    with pytest.raises(ValueError, match="not found"):
        peft.get_peft_model(repavit_ops.fuse(classifier()), config)


# --- accelerate -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"vit": "cpu", "classifier": "cpu"}], ids=str)
def test_models_loaded_by_a_device_map_fuse(tmp_path, device_map):
    pytest.importorskip("accelerate")
    model = classifier()
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path, device_map=device_map).eval()
    fused = repavit_ops.fuse(loaded)
    assert fused_and_skipped(fused) == (4, {})
    assert relative(fused(images(2, 32, 32)).logits, model(images(2, 32, 32)).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [False, True], ids=["one_layer", "every_module"])
def test_accelerates_hooks_are_kept_and_the_report_says_how_to_remove_them(everywhere):
    hooks = pytest.importorskip("accelerate.hooks")
    model = classifier()
    x = images(2, 32, 32)
    expected = model(x).logits
    seen = []

    class Seeing(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    for name, module in model.named_modules():
        if name and (everywhere or name == "vit.layers.0"):
            hooks.add_hook_to_module(module, Seeing())
    fused = repavit_ops.fuse(model)
    count, skipped = fused_and_skipped(fused)
    assert count == (0 if everywhere else 4)
    assert any("remove_hook_from_module(model, recurse=True)" in why for why in skipped.values()) is everywhere
    seen.clear()
    assert relative(fused(x).logits, expected) < 1e-5
    assert fused.vit.layers[0] in seen
    hooks.remove_hook_from_module(model, recurse=True)
    assert fused_and_skipped(repavit_ops.fuse(model)) == (4, {})


# --- the rest ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@needs_cpp
def test_recorders_of_hidden_states_are_no_hooks_that_hinder():
    model = classifier()
    model(images(1, 32, 32), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert repavit_ops.can_fuse(model.vit.layers[0]) is None


@torch.no_grad()
@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
@needs_cpp
def test_pipelines_take_a_fused_model(task):
    image = pytest.importorskip("PIL.Image")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    model = classifier() if task == "image-classification" else classifier().vit
    fused = repavit_ops.fuse(model)
    photo = torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    photo = image.fromarray(photo.numpy())
    expected = transformers.pipeline(task, model=model, image_processor=processor)(photo)
    with Recorder() as recorder:
        ours = transformers.pipeline(task, model=fused, image_processor=processor)(photo)
    assert any("fused_blocks" in call for call in recorder.calls)
    if task == "image-classification":
        assert [found["label"] for found in ours] == [found["label"] for found in expected]
        ours, expected = ([found["score"] for found in found_] for found_ in (ours, expected))
    assert relative(torch.tensor(ours), torch.tensor(expected)) < 1e-5


@torch.no_grad()
def test_half_after_fusing_keeps_to_the_tolerance_rule():
    model, x = classifier(), images(2, 32, 32)
    exact = copy.deepcopy(model).double()(x.double()).logits
    ours = repavit_ops.fuse(model).half()(x.half()).logits
    eager = copy.deepcopy(model).half()(x.half()).logits
    off, bound = ((y.double() - exact).abs().max() for y in (ours, eager))
    assert off <= 2 * bound + 1e-6


def test_checkpointing_of_activations_gives_the_gradients_of_the_unfused_model():
    model, x = classifier().requires_grad_(True), images(2, 32, 32)
    grads = []
    for found in (model, repavit_ops.fuse(model).requires_grad_(True)):
        found.train()
        found.gradient_checkpointing_enable({"use_reentrant": False})
        pixels = x.clone().requires_grad_(True)
        found(pixels).logits.square().sum().backward()
        grads.append(pixels.grad)
    assert relative(grads[1], grads[0]) < 1e-4
