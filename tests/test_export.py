"""Ways out of Python: ONNX of what is merged or fused, programs of torch.export, AOTInductor."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from model_helpers import images, tiny_swin, tiny_vit

import repavit_ops


def small_swin():
    return tiny_swin(img_size=32, depths=[2, 1])


builders = pytest.mark.parametrize("build", [tiny_vit, small_swin], ids=["vit", "swin"])


def onnx_program(model, x, **options):
    pytest.importorskip("onnxscript")
    return torch.onnx.export(model, (x,), dynamo=True, input_names=["x"], verbose=False, **options)


def run_onnx(program, x):
    file = io.BytesIO()
    program.save(file)
    return run_file(file, x)


def run_file(file, x):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_a_timm_model_of_another_size_is_exported_at_that_size(timm, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    assert repavit_ops.exporting.export_model(model, tmp_path / "model.onnx").passed


@builders
def test_a_merged_model_runs_in_onnx_runtime_at_any_batch(build):
    model = repavit_ops.reparameterize(build())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = onnx_program(model, images(), dynamic_shapes=({0: batch},))
    for count in (1, 2, 5):
        x = images(count, seed=count)
        torch.testing.assert_close(run_onnx(program, x), model(x).detach(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_fused_in_plain_pytorch_exports_too():
    fused, x = repavit_ops.fuse(tiny_vit(), backend="reference"), images()
    torch.testing.assert_close(run_onnx(onnx_program(fused, x), x), fused(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of torch's exporters about themselves
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@builders
def test_a_fused_model_is_exported_to_onnx_as_its_formulas(build, dynamo):
    pytest.importorskip("onnxscript")
    fused, x, file = repavit_ops.fuse(build()), images(), io.BytesIO()
    expected = fused(x).detach()
    torch.onnx.export(fused, (x,), file, dynamo=dynamo, input_names=["x"], verbose=False)
    torch.testing.assert_close(run_file(file, x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused(x).detach(), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_fused_model_is_exported_to_onnx_at_any_batch():
    fused = repavit_ops.fuse(small_swin())
    program = onnx_program(fused, images(), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    x = images(3, seed=3)
    torch.testing.assert_close(run_onnx(program, x), fused(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_operators_by_themselves_are_exported_to_onnx(dynamo):
    class Norm(torch.nn.Module):
        def forward(self, x):
            empty = x.new_empty(0, 6)
            return repavit_ops.ops.partial_gelu_ffn(x, empty, None, empty.t(), torch.eye(6), None, norm_eps=1e-6)

    pytest.importorskip("onnxscript")
    x, file = torch.randn(3, 6), io.BytesIO()
    torch.onnx.export(Norm(), (x,), file, dynamo=dynamo, input_names=["x"], verbose=False)
    torch.testing.assert_close(run_file(file, x), Norm()(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_a_model_without_plain_weights_is_not_exported_to_onnx(dynamo):
    pytest.importorskip("onnxscript")
    fused = repavit_ops.fuse(tiny_vit(), keep_unpacked=False)
    with pytest.raises(Exception, match=r"keep_unpacked=False.*export what fuse\(keep_unpacked=True\) gives"):
        torch.onnx.export(fused, (images(),), io.BytesIO(), dynamo=dynamo, verbose=False)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_program_with_kernels_is_refused_by_onnx_with_the_fix():
    pytest.importorskip("onnxscript")
    program = torch.export.export(repavit_ops.fuse(tiny_vit(depth=1)), (images(),))
    with pytest.raises(Exception, match=r"hand torch\.onnx\.export the model itself"):
        torch.onnx.export(program, (images(),), io.BytesIO(), dynamo=True, verbose=False)


@torch.no_grad()
@builders
def test_aot_inductor_runs_a_fused_model_with_its_kernels(build, tmp_path):
    fused, x = repavit_ops.fuse(build()), images()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    runner = torch._inductor.aoti_load_package(package)
    more = images(3, seed=7)
    for images_ in (x, more):
        torch.testing.assert_close(runner(images_), fused(images_), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_saved_program_runs_without_the_model(tmp_path):
    fused, x = repavit_ops.fuse(tiny_vit()), images()
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(copy.deepcopy(fused), (x,)), path)
    torch.testing.assert_close(torch.export.load(path).module()(x), fused(x))
