"""Ways out of Python: ONNX of what is merged, a clear refusal of what is fused, AOTInductor of either."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from model_helpers import images, tiny_swin, tiny_vit

import repavit_ops

SIZES = {tiny_vit: 32, tiny_swin: 64}
builders = pytest.mark.parametrize("build", SIZES, ids=["vit", "swin"])


def onnx_program(model, x, **options):
    pytest.importorskip("onnxscript")
    return torch.onnx.export(model, (x,), dynamo=True, input_names=["x"], verbose=False, **options)


def run_onnx(program, x):
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@torch.no_grad()
@builders
def test_a_merged_model_runs_in_onnx_runtime_at_any_batch(build):
    model, size = repavit_ops.reparameterize(build()), SIZES[build]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = onnx_program(model, images(2, size), dynamic_shapes=({0: batch},))
    for count in (1, 2, 5):
        x = images(count, size, seed=count)
        torch.testing.assert_close(run_onnx(program, x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_fused_in_plain_pytorch_exports_too():
    fused, x = repavit_ops.fuse(tiny_vit(), backend="reference"), images()
    torch.testing.assert_close(run_onnx(onnx_program(fused, x), x), fused(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@builders
def test_exporting_a_fused_model_to_onnx_says_what_to_do(build, dynamo):
    pytest.importorskip("onnxscript")
    fused = repavit_ops.fuse(build())
    with pytest.raises(Exception, match=r"export the model before it is fused") as caught:
        torch.onnx.export(fused, (images(2, SIZES[build]),), io.BytesIO(), dynamo=dynamo, verbose=False)
    assert "reparameterize" in str(caught.value)


@torch.no_grad()
@builders
def test_aot_inductor_runs_a_fused_model_with_its_kernels(build, tmp_path):
    fused, x = repavit_ops.fuse(build()), images(2, SIZES[build])
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    runner = torch._inductor.aoti_load_package(package)
    more = images(3, SIZES[build], seed=7)
    for images_ in (x, more):
        torch.testing.assert_close(runner(images_), fused(images_), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_saved_program_runs_without_the_model(tmp_path):
    fused, x = repavit_ops.fuse(tiny_vit()), images()
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(copy.deepcopy(fused), (x,)), path)
    torch.testing.assert_close(torch.export.load(path).module()(x), fused(x))
