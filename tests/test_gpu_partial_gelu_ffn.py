"""partial_gelu_ffn on a GPU: numbers, strides, precision switches, graphs, streams, devices, large indices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_helpers import (
    CUDA,
    DTYPES,
    assert_current_stream,
    assert_graph_replays,
    assert_own_device,
    every_dtype,
    needs_memory,
    two_devices,
)
from op_helpers import assert_follows_rule, cast, check_operator
from test_partial_gelu_ffn import SHAPES, operands

from repavit_ops import backends, ops, reference

pytestmark = pytest.mark.gpu

LARGE = {"deit_tiny_8": (8 * 197, 192, 192), "deit_tiny_128": (128 * 197, 192, 192), "deit_base_8": (8 * 197, 768, 768)}


def on_gpu(*sizes, dtype=torch.float64):
    return tuple(t.to(CUDA, dtype) for t in operands(*sizes))


def run(*tensors, **static):
    return ops.partial_gelu_ffn(*tensors, backend="triton", **static)


def check(tensors, dtype, **static):
    check_operator(run, reference.partial_gelu_ffn, tensors, dtype, **static)


def test_triton_is_what_auto_takes():
    assert backends.why_unavailable("triton") is None
    assert backends.has_triton_kernel("partial_gelu_ffn")
    tensors = on_gpu(197, 192, 192, dtype=torch.bfloat16)
    assert torch.equal(ops.partial_gelu_ffn(*tensors), run(*tensors))


@every_dtype
@pytest.mark.parametrize("shape", SHAPES | LARGE)
def test_matches_truth_at_every_shape(shape, dtype):
    check(on_gpu(*(SHAPES | LARGE)[shape]), dtype)


@every_dtype
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["no_norm", "norm"])
@pytest.mark.parametrize("rows", [197, 5000])
def test_every_option(rows, norm_eps, residual, approximate, dtype):
    tensors = on_gpu(rows, 192, 96)
    check(tensors, dtype, norm_eps=norm_eps, residual=residual, approximate=approximate)
    without = (*tensors[:4], None, tensors[5])
    check(without, dtype, norm_eps=norm_eps, residual=residual, approximate=approximate)


@every_dtype
def test_rows_far_from_zero(dtype):
    x, *weights = on_gpu(197, 192, 192)
    check((x + 30, *weights), dtype, norm_eps=1e-6)


@every_dtype
def test_strided_and_misaligned_inputs(dtype):
    x, *weights = on_gpu(24, 40, 24, dtype=dtype)
    wide = torch.zeros(24, 81, device=CUDA, dtype=dtype)
    wide[:, 1:41] = x
    shifted = torch.zeros(24 * 40 + 1, device=CUDA, dtype=dtype)[1:].view(24, 40).copy_(x)
    for variant in (x.t().contiguous().t(), wide[:, 1:41], shifted, x.expand(2, 24, 40)[1], x[:1].expand(24, 40)):
        expected = reference.partial_gelu_ffn(*(t.double() for t in (variant, *weights)))
        eager = reference.partial_gelu_ffn(variant, *weights)
        assert_follows_rule(run(variant, *weights), eager, expected)
    strided = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
    torch.testing.assert_close(run(x, *strided), run(x, *weights), rtol=0, atol=0)


def test_fp32_products_follow_pytorchs_switch():
    tensors = on_gpu(512, 768, 768, dtype=torch.float32)
    truth = reference.partial_gelu_ffn(*cast(tensors, torch.float64))
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            y = run(*tensors)
            assert_follows_rule(y, reference.partial_gelu_ffn(*tensors), truth)
            errors[precision] = (y.double() - truth).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5
    assert errors["tf32"] > 10 * errors["ieee"]


def test_special_values():
    for dtype in DTYPES:
        one = torch.ones(1, 1, device=CUDA, dtype=dtype)
        for value in (float("nan"), float("inf"), float("-inf"), -0.0, 1e4, -1e4):
            x = torch.full((1, 1), value, device=CUDA, dtype=dtype)
            torch.testing.assert_close(run(x, one, None, one, None, None), F.gelu(x), equal_nan=True)


@every_dtype
@pytest.mark.parametrize("rows", [33, 25216])
def test_same_input_gives_the_same_bits(rows, dtype):
    tensors = on_gpu(rows, 192, 192, dtype=dtype)
    assert torch.equal(run(*tensors), run(*tensors))


def test_every_element_is_written():
    """The allocator hands out a block full of NaN; none may remain."""
    for rows, c, m in ((37, 53, 29), (25216, 192, 192)):
        tensors = on_gpu(rows, c, m, dtype=torch.bfloat16)
        blocks = [torch.full((rows, width), float("nan"), device=CUDA, dtype=torch.bfloat16) for width in (c, m, c)]
        del blocks
        assert run(*tensors).isfinite().all()


def test_gradients_equal_the_references():
    ours = tuple(t.requires_grad_() for t in on_gpu(37, 40, 24, dtype=torch.float32))
    theirs = tuple(t.detach().clone().requires_grad_() for t in ours)
    run(*ours, residual=True).square().sum().backward()
    reference.partial_gelu_ffn(*theirs, residual=True).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_opcheck():
    tensors = tuple(t.requires_grad_() for t in on_gpu(5, 16, 8, dtype=torch.float32))
    torch.library.opcheck(torch.ops.repavit_ops.partial_gelu_ffn.default, tensors, {"norm_eps": 1e-6, "residual": True})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic):
    torch._dynamo.reset()
    tensors = on_gpu(197, 192, 192, dtype=torch.bfloat16)
    compiled = torch.compile(lambda *t: torch.ops.repavit_ops.partial_gelu_ffn(*t) + 1, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*tensors), run(*tensors) + 1)


def test_autocast_runs_in_its_dtype():
    tensors = on_gpu(64, 96, 48, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = run(*tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(*cast(tensors, torch.bfloat16)))


@pytest.mark.parametrize("rows", [197, 25216])
def test_cuda_graph_replays_on_new_numbers(rows):
    assert_graph_replays(run, *on_gpu(rows, 192, 192, dtype=torch.bfloat16))


def test_runs_on_the_current_stream():
    assert_current_stream(run, *on_gpu(197, 192, 192, dtype=torch.bfloat16))


@two_devices
def test_runs_on_the_tensors_own_device():
    assert_own_device(run, *on_gpu(197, 192, 192, dtype=torch.bfloat16))


def test_float64_is_computed_by_the_reference():
    tensors = on_gpu(33, 40, 24)
    assert torch.equal(ops.partial_gelu_ffn(*tensors), reference.partial_gelu_ffn(*tensors))


@pytest.mark.parametrize("c", [64, 65], ids=["descriptors", "pointers"])
def test_more_than_two_billion_elements(c):
    rows = 2**31 // c + 1000
    with needs_memory(4.5 * 2 * rows * c / 1e9), torch.inference_mode():
        _, *weights = on_gpu(1, c, c, dtype=torch.bfloat16)
        x = torch.randn(rows, c, device=CUDA, dtype=torch.bfloat16)
        y = run(x, *weights, residual=True, norm_eps=1e-6)
        for part in (slice(0, 500), slice(rows // 2, rows // 2 + 500), slice(rows - 500, rows)):
            expected = reference.partial_gelu_ffn(
                *(t.double() for t in (x[part], *weights)), residual=True, norm_eps=1e-6
            )
            eager = reference.partial_gelu_ffn(x[part], *weights, residual=True, norm_eps=1e-6)
            assert_follows_rule(y[part].contiguous(), eager, expected)
        del x, y


@pytest.mark.filterwarnings("error:.*wrong results")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear_norm_gelu", "two_source", "on_chip"])
@pytest.mark.parametrize("rows", [50, 2500])
def test_every_tile_that_the_tuner_may_choose(rows, kind, dtype):
    """All that fit this GPU give the right result: the tuner's own check warns of any that does not."""
    from repavit_ops.kernels import tuner

    product = tuner.Product(kind, dtype, rows, 192, 384 if kind == "two_source" else 192)
    measured = tuner.measure(product, CUDA, timer=lambda call: 1.0)
    assert measured.theirs == 1.0
