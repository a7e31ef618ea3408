"""Promises that every operator keeps on a GPU: graphs, streams, devices, gradients, compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")

Call = Callable[..., Tensor]  # the operator on its tensors, everything else given


def to_gpu(tensors: tuple[Tensor | None, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(CUDA, dtype) for t in tensors)


@contextlib.contextmanager
def needs_memory(gigabytes: float) -> Iterator[None]:
    """Skip, visibly, where less GPU memory is free; give back what was taken."""
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"less than {gigabytes:.0f} GB of GPU memory are free")
    yield
    torch.cuda.empty_cache()


def assert_graph_replays(run: Call, x: Tensor, *weights: Tensor | None) -> None:
    """A captured call gives, on new numbers, what a direct one gives, and allocates nothing."""
    run(x, *weights)  # compiles outside the capture
    graph, static = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = run(static, *weights)
    fresh = torch.randn_like(x)
    static.copy_(fresh)
    before = torch.cuda.memory_allocated()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(y, run(fresh, *weights))


def assert_current_stream(run: Call, x: Tensor, *weights: Tensor | None) -> None:
    """Input is made on a side stream behind a long wait: a launch on another stream would read it too early."""
    expected = run(x, *weights)
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        y = run(late, *weights)
    stream.synchronize()
    assert torch.equal(y, expected)


def assert_own_device(run: Call, *tensors: Tensor | None) -> None:
    """Tensors of cuda:1 are computed there while cuda:0 is current."""
    assert torch.cuda.current_device() == 0
    y = run(*(None if t is None else t.to("cuda:1") for t in tensors))
    assert y.device == torch.device("cuda:1")
    torch.testing.assert_close(y.cpu(), run(*tensors).cpu())


def assert_gradients(run: Call, reference: Call, *tensors: Tensor | None) -> None:
    """Gradients of every tensor equal those of the reference."""
    ours = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    theirs = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    run(*ours).square().sum().backward()
    reference(*theirs).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def assert_compiles(operator: Call, run: Call, *tensors: Tensor | None, dynamic: bool) -> None:
    """``operator`` (through torch.ops) in a compiled graph without breaks equals ``run``."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: operator(*t) + 1, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*tensors), run(*tensors) + 1)


def assert_autocast(run: Call, *tensors: Tensor | None) -> None:
    """fp32 tensors under bf16 autocast give the bits of the operator on bf16 tensors."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = run(*tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(*(None if t is None else t.bfloat16() for t in tensors)))


def fill_free_memory_with_nan(*shapes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leave blocks of NaN to the allocator, from which results of these shapes will be taken."""
    blocks = [torch.full(shape, float("nan"), device=CUDA, dtype=dtype) for shape in shapes]
    del blocks
