"""Whole models on a GPU: fused equals eager, patches and stacks, graphs, tables."""

from __future__ import annotations

from functools import partial

import gpu_helpers as gpu
import pytest
import torch
from gpu_helpers import CUDA, every_dtype
from op_helpers import check_operator
from test_patch_projection import CASES
from test_patch_projection import operands as patches
from torch.utils._python_dispatch import TorchDispatchMode

import repavit_ops
from repavit_ops import ops, reference
from repavit_ops.predicting import Predictor

pytestmark = pytest.mark.gpu

MODELS = ["repa_deit_tiny", "vanilla_deit_tiny", "repa_swin_tiny", "repa_vit_huge"]


class Names(TorchDispatchMode):
    """Collects the names of what is called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func.name())
        return func(*args, **(kwargs or {}))


def build(name, **options):
    torch.manual_seed(0)
    return repavit_ops.create_model(name, num_classes=10, **options).eval().to(CUDA)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_model_equals_the_eager_one(name, dtype):
    model = build(name)
    images = torch.randn(2, 3, 224, 224, device=CUDA)
    fused = repavit_ops.fuse(model, dtype=dtype)
    report = repavit_ops.fusion_report(fused)
    assert "cuda: Triton kernels" in report.runs_on
    assert not report.skipped
    assert repavit_ops.verify(model, fused, images)


def test_a_stack_never_calls_what_is_the_cpus():
    fused = repavit_ops.fuse(build("repa_deit_tiny", depth=3), dtype=torch.bfloat16)
    (entry,) = repavit_ops.fusion_report(fused).with_status("apart")
    assert "every sub-block is called by itself" in entry.note
    with torch.inference_mode(), Names() as names:
        fused(torch.randn(1, 3, 224, 224, device=CUDA, dtype=torch.bfloat16))
    assert "repavit_ops::fused_blocks" not in names.called
    assert names.called.count("repavit_ops::partial_gelu_ffn") == 3


def test_fused_blocks_runs_the_kernels():
    fused = repavit_ops.fuse(build("repa_deit_tiny", depth=2), dtype=torch.bfloat16)
    steps = [part.step() for block in fused.blocks for part in (block.attn, block.mlp)]
    x = torch.randn(2, 197, 192, device=CUDA, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(ops.fused_blocks(x, steps, backend="triton"), fused.blocks(x))


@every_dtype
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[1]])
@pytest.mark.parametrize("norm_eps", [None, 1e-5], ids=["", "norm"])
def test_patch_projection(case, norm_eps, dtype):
    sizes = CASES[case]
    tensors = gpu.to_gpu(patches(*sizes))
    static = {"patch": sizes[4], "channels_last": sizes[6], "norm_eps": norm_eps}
    run = partial(ops.patch_projection, backend="triton")
    check_operator(run, reference.patch_projection, tensors, dtype, **static)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_backends_by_name(backend):
    model = build("repa_deit_tiny", depth=2)
    images = torch.randn(2, 3, 224, 224, device=CUDA)
    assert repavit_ops.verify(model, repavit_ops.fuse(model, backend=backend), images)


# --- cuda_graph -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused():
    return repavit_ops.fuse(build("repa_deit_tiny", depth=3), dtype=torch.bfloat16)


def images(batch, seed=0):
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(batch, 3, 224, 224, device=CUDA, generator=generator).bfloat16()


@torch.inference_mode()
def test_graph_gives_what_the_model_gives(fused):
    graphed = repavit_ops.cuda_graph(fused)
    kept = []
    for seed, batch in enumerate((1, 4, 1, 4, 1)):
        x = images(batch, seed)
        y, expected = graphed(x), fused(x)
        assert torch.equal(y, expected)
        kept.append((y, expected))
    assert all(torch.equal(y, expected) for y, expected in kept)  # later calls wrote over none of them
    assert len(graphed._graphs) == 2


@torch.inference_mode()
def test_replays_allocate_only_their_results(fused):
    graphed, x = repavit_ops.cuda_graph(fused), images(4)
    graphed(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = graphed(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 2 * y.nbytes + 1024


@torch.inference_mode()
def test_graphs_follow_each_other_on_every_stream(fused):
    graphed = repavit_ops.cuda_graph(fused)
    inputs = [images(2 + i % 2, i) for i in range(8)]
    expected = [fused(x) for x in inputs]
    graphed(inputs[0]), graphed(inputs[1])
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 4]):
            results.append(graphed(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, e) for y, e in zip(results, expected, strict=True))


@torch.inference_mode()
def test_autocast_graph_survives_its_weights():
    """The casts of the weights belong to the graph: nothing that autocast frees is read at a replay."""
    model, x = build("vanilla_deit_tiny", depth=2), images(2).float()
    graphed = repavit_ops.cuda_graph(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = model(x)
        graphed(x)
    gpu.fill_free_memory_with_nan((64, 1024, 1024), dtype=torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.testing.assert_close(graphed(x), expected)


@torch.no_grad()
def test_weights_loaded_into_the_model_are_used(fused):
    graphed, x = repavit_ops.cuda_graph(fused), images(1)
    before = graphed(x)
    fused.load_state_dict({name: value * 1.01 for name, value in fused.state_dict().items()})
    assert torch.equal(graphed(x), fused(x))
    assert not torch.equal(graphed(x), before)


@gpu.two_devices
@torch.inference_mode()
def test_graph_on_the_models_own_device(fused):
    other = fused.to("cuda:1")
    x = images(2).to("cuda:1")
    assert torch.equal(repavit_ops.cuda_graph(other)(x), other(x))


def test_cpu_inputs_and_gradients_are_refused(fused):
    graphed = repavit_ops.cuda_graph(fused.requires_grad_())
    with torch.no_grad(), pytest.raises(ValueError, match="got a tensor on cpu"):
        graphed(images(1).cpu())
    with pytest.raises(RuntimeError, match="gradients are wanted"):
        graphed(images(1))


# --- tune -------------------------------------------------------------------------------------------------------------


def test_tune_writes_a_table_that_the_launchers_take(tmp_path, monkeypatch):
    from repavit_ops.kernels import tuner, tuning
    from repavit_ops.kernels.chips import chip_of

    monkeypatch.setenv("REPAVIT_TUNED", str(tmp_path))
    products = [
        tuning.Product("linear", torch.bfloat16, 197, 192, 192),
        tuning.Product("attention", torch.bfloat16, 24, 197, 64),
        tuning.Product("window_attention", torch.bfloat16, 192, 49, 32),
    ]
    measured = list(tuner.tune(products, CUDA, tmp_path))
    assert {m.product.kind for m in measured} == {"linear", "attention", "window_attention"}
    assert all(0 < min(m.ours, m.theirs) < 1e4 for m in measured)
    assert tuning.lookup("attention", chip_of(CUDA), torch.bfloat16, 24, 197, 64) is not None
    tuning.forget_tables()


def test_a_predictor_computes_on_the_gpu_what_it_does_on_the_cpu():
    model = build("repa_deit_tiny").cpu()
    pixels = torch.randint(256, (5, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, expected = (Predictor(model, features=True, threads=1, device=d).predict(pixels) for d in (CUDA, "cpu"))
    for name, tolerance in (("features", 1e-4), ("scores", 1e-5)):
        torch.testing.assert_close(*(torch.from_numpy(t[name]) for t in (ours, expected)), rtol=0.0, atol=tolerance)
