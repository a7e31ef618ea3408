"""window_rep_attention on a GPU: windows, shifts, padding and roll orders, graphs, streams, devices, large indices."""

from __future__ import annotations

from functools import partial

import gpu_helpers as gpu
import pytest
import torch
from gpu_helpers import CUDA, every_dtype, to_gpu
from op_helpers import assert_follows_rule, cast, check_operator
from test_window_rep_attention import SHAPES, op, operands

from repavit_ops import backends, reference

pytestmark = pytest.mark.gpu

LARGE = {
    "swin_stage1_8": (8, 56, 56, 96, 3, 32, (7, 7), (3, 3)),
    "swin_stage3_32": (32, 14, 14, 384, 12, 32, (7, 7), (3, 3)),
    "window_12": (2, 24, 24, 96, 3, 32, (12, 12), (6, 6)),
    "detection": (1, 200, 334, 32, 1, 32, (7, 7), (3, 3)),
}
run = partial(op, backend="triton")


def on_gpu(*sizes, dtype=torch.float64):
    tensors, static = operands(*sizes)
    return to_gpu(tensors, dtype), static


def check(tensors, dtype, **static):
    return check_operator(run, reference.window_rep_attention, tensors, dtype, **static)


def test_triton_is_what_auto_takes():
    assert backends.has_triton_kernel("window_rep_attention")
    tensors, static = on_gpu(*SHAPES["swin_shifted"], dtype=torch.bfloat16)
    assert torch.equal(op(*tensors, **static), run(*tensors, **static))


@every_dtype
@pytest.mark.parametrize("shape", SHAPES | LARGE)
def test_matches_truth_at_every_shape(shape, dtype):
    tensors, static = on_gpu(*(SHAPES | LARGE)[shape])
    check(tensors, dtype, norm_eps=1e-5, residual=True, **static)


@every_dtype
@pytest.mark.parametrize("pad", [False, True], ids=["pad_b_qkv", "pad_kv"])
@pytest.mark.parametrize("roll_first", [False, True], ids=["pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize("plain", [False, True], ids=["norm_residual", "plain"])
@pytest.mark.parametrize("shape", ["padded", "detection_like"])
def test_every_option(shape, plain, roll_first, pad, dtype):
    tensors, static = on_gpu(*SHAPES[shape])
    tensors = tensors if pad else (*tensors[:6], None)
    options = {} if plain else {"norm_eps": 1e-5, "residual": True}
    check(tensors, dtype, roll_first=roll_first, **options, **static)


@every_dtype
def test_without_biases(dtype):
    tensors, static = on_gpu(*SHAPES["padded"])
    check((*tensors[:2], None, tensors[3], None, tensors[5], None), dtype, **static)


@every_dtype
@pytest.mark.parametrize("shape", ["swin_stage1", "swin_shifted"])
def test_same_input_gives_the_same_bits(shape, dtype):
    tensors, static = on_gpu(*SHAPES[shape], dtype=dtype)
    assert torch.equal(run(*tensors, **static), run(*tensors, **static))


def test_every_element_is_written():
    tensors, static = on_gpu(*SHAPES["detection_like"], dtype=torch.bfloat16)
    gpu.fill_free_memory_with_nan((25 * 42, 96), (25 * 42, 32), (25 * 42, 32), dtype=torch.bfloat16)
    assert run(*tensors, **static).isfinite().all()


def test_gradients_equal_the_references():
    tensors, static = on_gpu(*SHAPES["padded"], dtype=torch.float32)
    gpu.assert_gradients(partial(run, **static), partial(reference.window_rep_attention, **static), *tensors)


def test_opcheck():
    tensors, static = on_gpu(*SHAPES["window_4"], dtype=torch.float32)
    tensors = tuple(t.requires_grad_() for t in tensors)
    torch.library.opcheck(torch.ops.repavit_ops.window_rep_attention.default, tensors, static)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic):
    tensors, static = on_gpu(*SHAPES["swin_shifted"], dtype=torch.bfloat16)
    operator = partial(torch.ops.repavit_ops.window_rep_attention, **static)
    gpu.assert_compiles(operator, partial(run, **static), *tensors, dynamic=dynamic)


def test_autocast_runs_in_its_dtype():
    tensors, static = on_gpu(*SHAPES["padded"], dtype=torch.float32)
    gpu.assert_autocast(partial(run, **static), *tensors)


@pytest.mark.parametrize("shape", ["swin_shifted", "padded"])
def test_cuda_graph_replays_on_new_numbers(shape):
    tensors, static = on_gpu(*SHAPES[shape], dtype=torch.bfloat16)
    gpu.assert_graph_replays(partial(run, norm_eps=1e-5, residual=True, **static), *tensors)


def test_runs_on_the_current_stream():
    tensors, static = on_gpu(*SHAPES["swin_shifted"], dtype=torch.bfloat16)
    gpu.assert_current_stream(partial(run, **static), *tensors)


@gpu.two_devices
def test_runs_on_the_tensors_own_device():
    tensors, static = on_gpu(*SHAPES["swin_shifted"], dtype=torch.bfloat16)
    gpu.assert_own_device(partial(run, **static), *tensors)


def test_float64_is_computed_by_the_reference():
    tensors, static = on_gpu(*SHAPES["padded"])
    assert torch.equal(op(*tensors, **static), reference.window_rep_attention(*tensors, **static))


def test_more_than_two_billion_elements():
    """qkv passes 2³¹ elements; maps at both ends are compared."""
    maps = 2**31 // (49 * 96) + 1000
    tensors, static = on_gpu(1, 7, 7, 32, 1, 32, (7, 7), (3, 3), dtype=torch.bfloat16)
    with gpu.needs_memory(2 * maps * 49 * (32 * 6) / 1e9), torch.inference_mode():
        x = torch.randn(maps, 7, 7, 32, device=CUDA, dtype=torch.bfloat16)
        y = run(x, *tensors[1:], **static)
        for part in (slice(0, 3), slice(maps - 3, maps)):
            several = (x[part], *tensors[1:])
            truth = reference.window_rep_attention(*cast(several, torch.float64), **static)
            assert_follows_rule(y[part], reference.window_rep_attention(*several, **static), truth)
        del x, y


@pytest.mark.filterwarnings("error:.*wrong results")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [49, 144])
def test_every_tile_that_the_tuner_may_choose(tokens, dtype):
    """All that fit this GPU give the right result: the tuner's own check warns of any that does not."""
    from repavit_ops.kernels import tuner

    product = tuner.Product("window_attention", dtype, 6144, tokens, 32)
    assert tuner.measure(product, CUDA, timer=lambda call: 1.0).theirs == 1.0
