"""rep_attention on a GPU: numbers at every shape, masks, precision, graphs, streams, devices, large indices."""

from __future__ import annotations

from functools import partial

import gpu_helpers as gpu
import pytest
import torch
from gpu_helpers import CUDA, every_dtype, to_gpu
from op_helpers import assert_follows_rule, cast, check_operator, randn
from test_rep_attention import SHAPES, op, operands

from repavit_ops import backends, ops, reference

pytestmark = pytest.mark.gpu

LARGE = {
    "deit_tiny_64": (64, 197, 192, 3, 64, 64),
    "deit_base_8": (8, 197, 768, 12, 64, 64),
    "huge_2": (2, 257, 1280, 16, 80, 80),
    "long_4096": (1, 4096, 64, 1, 64, 64),
    "head_of_256": (2, 70, 64, 1, 256, 256),
}
run = partial(op, backend="triton")


def on_gpu(*sizes, dtype=torch.float64, **options):
    tensors, static = operands(*sizes, **options)
    return to_gpu(tensors, dtype), static


def check(tensors, dtype, **static):
    return check_operator(run, reference.rep_attention, tensors, dtype, **static)


def test_triton_is_what_auto_takes():
    assert backends.why_unavailable("triton") is None
    assert backends.has_triton_kernel("rep_attention")
    tensors, static = on_gpu(2, 197, 192, 3, 64, 64, dtype=torch.bfloat16)
    assert torch.equal(op(*tensors, **static), run(*tensors, **static))


@every_dtype
@pytest.mark.parametrize("shape", SHAPES | LARGE)
def test_matches_truth_at_every_shape(shape, dtype):
    tensors, static = on_gpu(*(SHAPES | LARGE)[shape])
    check(tensors, dtype, **static)


@every_dtype
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["no_norm", "norm"])
@pytest.mark.parametrize("batch", [1, 16])
def test_every_option(batch, norm_eps, residual, dtype):
    tensors, static = on_gpu(batch, 197, 192, 3, 64, 64)
    check(tensors, dtype, norm_eps=norm_eps, residual=residual, **static)
    check((*tensors[:2], None, tensors[3], None), dtype, norm_eps=norm_eps, residual=residual, **static)


@every_dtype
@pytest.mark.parametrize("batch", [1, 64])
def test_a_norm_in_front_of_the_projection(batch, dtype):
    tensors, static = on_gpu(batch, 197, 192, 3, 64, 64)
    check(tensors, dtype, inner_norm_eps=1e-3, residual=True, **static)


@every_dtype
@pytest.mark.parametrize("shape", [(23, 23), (2, 23, 23), (1, 1, 1, 23), (3, 2, 23, 23), (3, 1, 23, 1), (1,)], ids=str)
def test_bias_of_any_broadcastable_shape(shape, dtype):
    tensors, static = on_gpu(3, 23, 32, 2, 16, 16)
    check((*tensors, randn(*shape, seed=5).to(CUDA)), dtype, **static)


@every_dtype
@pytest.mark.parametrize("tokens", [19, 197, 700])
def test_rows_of_minus_infinity(tokens, dtype):
    tensors, static = on_gpu(2, tokens, 32, 2, 16, 16)
    mask = torch.full((tokens, tokens), float("-inf"), dtype=torch.float64, device=CUDA).triu(1)
    mask[tokens // 2] = float("-inf")
    y = check((*tensors, mask), dtype, **static)
    torch.testing.assert_close(y[:, tokens // 2], tensors[4].to(dtype).expand(2, -1))


@pytest.mark.parametrize("scale", [0.0, -0.2, 2.0])
def test_every_scale(scale):
    tensors, static = on_gpu(2, 50, 64, 1, 64, 64)
    check(tensors, torch.bfloat16, **(static | {"scale": scale}))


def test_fp32_products_follow_pytorchs_switch():
    tensors, static = on_gpu(4, 197, 192, 3, 64, 64, dtype=torch.float32)
    truth = reference.rep_attention(*cast(tensors, torch.float64), **static)
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = (run(*tensors, **static).double() - truth).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5
    assert 10 * errors["ieee"] < errors["tf32"] < 1e-2


def test_strided_and_misaligned_inputs():
    tensors, static = on_gpu(2, 24, 40, 2, 16, 16, dtype=torch.bfloat16)
    x, *weights = tensors
    shifted = torch.zeros(x.numel() + 1, device=CUDA, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    for variant in (x.transpose(0, 1).contiguous().transpose(0, 1), shifted, x[:1].expand(2, -1, -1)):
        eager = reference.rep_attention(variant, *weights, residual=True, **static)
        truth = reference.rep_attention(*cast((variant, *weights), torch.float64), residual=True, **static)
        assert_follows_rule(run(variant, *weights, residual=True, **static), eager, truth)


@every_dtype
@pytest.mark.parametrize("batch", [1, 64])
def test_same_input_gives_the_same_bits(batch, dtype):
    tensors, static = on_gpu(batch, 197, 192, 3, 64, 64, dtype=dtype)
    assert torch.equal(run(*tensors, **static), run(*tensors, **static))


def test_every_element_is_written():
    tensors, static = on_gpu(3, 37, 53, 3, 7, 5, dtype=torch.bfloat16)
    gpu.fill_free_memory_with_nan((3, 37, 57), (3, 37, 15), (3, 37, 53), dtype=torch.bfloat16)
    assert run(*tensors, **static).isfinite().all()


@pytest.mark.parametrize("bias", [False, True], ids=["", "attn_bias"])
def test_gradients_equal_the_references(bias):
    tensors, static = on_gpu(2, 21, 40, 2, 16, 16, dtype=torch.float32)
    tensors = (*tensors, randn(2, 21, 21, seed=5).to(CUDA, torch.float32)) if bias else tensors
    gpu.assert_gradients(partial(run, **static), partial(reference.rep_attention, **static), *tensors)


def test_opcheck():
    tensors, static = on_gpu(2, 5, 16, 2, 16, 16, dtype=torch.float32)
    tensors = tuple(t.requires_grad_() for t in tensors)
    torch.library.opcheck(torch.ops.repavit_ops.rep_attention.default, tensors, {"norm_eps": 1e-6, **static})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic):
    tensors, static = on_gpu(2, 197, 192, 3, 64, 64, dtype=torch.bfloat16)
    operator = partial(torch.ops.repavit_ops.rep_attention, **static)
    gpu.assert_compiles(operator, partial(run, **static), *tensors, dynamic=dynamic)


def test_autocast_runs_in_its_dtype():
    tensors, static = on_gpu(2, 50, 96, 2, 48, 48, dtype=torch.float32)
    gpu.assert_autocast(partial(run, **static), *tensors)


@pytest.mark.parametrize("batch", [1, 64])
def test_cuda_graph_replays_on_new_numbers(batch):
    tensors, static = on_gpu(batch, 197, 192, 3, 64, 64, dtype=torch.bfloat16)
    gpu.assert_graph_replays(partial(run, norm_eps=1e-6, residual=True, **static), *tensors)


def test_runs_on_the_current_stream():
    tensors, static = on_gpu(2, 197, 192, 3, 64, 64, dtype=torch.bfloat16)
    gpu.assert_current_stream(partial(run, **static), *tensors)


@gpu.two_devices
def test_runs_on_the_tensors_own_device():
    tensors, static = on_gpu(2, 197, 192, 3, 64, 64, dtype=torch.bfloat16)
    gpu.assert_own_device(partial(run, **static), *tensors)


def test_float64_is_computed_by_the_reference():
    tensors, static = on_gpu(2, 13, 32, 2, 16, 16)
    assert torch.equal(op(*tensors, **static), reference.rep_attention(*tensors, **static))


def test_more_than_two_billion_elements():
    """qkv passes 2³¹ elements; images at both ends and in the middle are compared."""
    images = 2**31 // (197 * 192) + 1000
    tensors, static = on_gpu(1, 197, 64, 1, 64, 64, dtype=torch.bfloat16)
    with gpu.needs_memory(2 * images * 197 * (64 * 6) / 1e9), torch.inference_mode():
        x = torch.randn(images, 197, 64, device=CUDA, dtype=torch.bfloat16)
        y = run(x, *tensors[1:], residual=True, **static)
        for part in (slice(0, 2), slice(images // 2, images // 2 + 2), slice(images - 2, images)):
            eager = reference.rep_attention(x[part], *tensors[1:], residual=True, **static)
            exact = cast((x[part], *tensors[1:]), torch.float64)
            assert_follows_rule(y[part], eager, reference.rep_attention(*exact, residual=True, **static))
        del x, y


def test_bias_of_more_than_two_billion_elements():
    """One bias per image and head, whose offsets pass 2³¹."""
    images = 2**31 // (16 * 512 * 512) + 8
    tensors, static = on_gpu(1, 512, 32, 16, 16, 16, dtype=torch.bfloat16)
    with gpu.needs_memory(2 * 1.2 * images * 16 * 512 * 512 / 1e9), torch.inference_mode():
        bias = torch.randn(images, 16, 512, 512, device=CUDA, dtype=torch.bfloat16)
        x = torch.randn(images, 512, 32, device=CUDA, dtype=torch.bfloat16)
        y = run(x, *tensors[1:], bias, **static)
        for part in (slice(0, 2), slice(images - 2, images)):
            several = (x[part], *tensors[1:], bias[part])
            truth = reference.rep_attention(*cast(several, torch.float64), **static)
            assert_follows_rule(y[part], reference.rep_attention(*several, **static), truth)
        del x, y, bias


@pytest.mark.filterwarnings("error:.*wrong results")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(197, 64), (50, 80)])
def test_every_tile_that_the_tuner_may_choose(tokens, width, dtype):
    """All that fit this GPU give the right result: the tuner's own check warns of any that does not."""
    from repavit_ops.kernels import tuner

    measured = tuner.measure(tuner.Product("attention", dtype, 24, tokens, width), CUDA, timer=lambda call: 1.0)
    assert measured.theirs == 1.0


def test_backend_reference_is_plain_pytorch():
    tensors, static = on_gpu(2, 13, 32, 2, 16, 16, dtype=torch.float32)
    y = ops.rep_attention(*tensors, backend="reference", **static)
    assert torch.equal(y, reference.rep_attention(*tensors, **static))
