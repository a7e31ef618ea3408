"""Deployed modules against the same formula in eager PyTorch, over shapes and dtypes: ``pytest bench/bench_shapes.py``.

The question is not how fast but whether "auto" is ever slower: it should then have left the call to PyTorch. Under
``no_grad``, from one element to more than any cache holds. Ratios of 20th percentiles: in microseconds, medians are the
machine's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import repavit_ops
from repavit_ops.benchmarking.harness import check, interleave
from repavit_ops.nn import PartialGELUFFN, RepAttention, WindowRepAttention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FFNS = [
    (c, m, merged, rows)
    for c, m, merged in (
        (1, 1, True),
        (16, 16, True),
        (64, 16, True),
        (192, 192, True),
        (192, 768, False),
        (384, 384, True),
        (768, 0, True),
        (768, 768, True),
        (768, 3072, False),
        (1280, 1280, True),
    )
    for rows in (1, 8, 49, 197, 1576)
]
ATTENTIONS = [
    (c, heads, tokens, batch)
    for c, heads in ((8, 1), (64, 4), (192, 3), (384, 6), (768, 12), (1280, 16))
    for tokens, batch in ((1, 1), (1, 64), (17, 1), (50, 8), (197, 1), (197, 8), (577, 1), (1025, 1))
]
WINDOWS = [
    (c, size, window, shift, batch)
    for c, size, window, shift in (
        (32, 7, 7, 0),
        (32, 8, 4, 2),
        (96, 56, 7, 3),
        (192, 28, 7, 3),
        (384, 14, 7, 3),
        (768, 7, 7, 0),
        (128, 24, 12, 6),
        (96, 50, 7, 3),
    )
    for batch in (1, 8)
]

MODELS = [
    (name, size, batch)
    for name, sizes in (
        ("repa_deit_tiny", (16, 32, 64, 512)),
        ("repa_deit_small", (32, 96)),
        ("repa_swin_tiny", (56, 112)),
    )
    for size in sizes
    for batch in (1, 3, 64)
    if size < 512 or batch < 64
]


def drawn(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights ~ 1/√fan_in and biases ~ 0.1, seeded."""
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        scale = p.shape[-1] ** -0.5 if p.dim() > 1 and p.numel() else 0.1
        p.data = torch.randn(p.shape, generator=g) * scale
    return module.to(dtype).eval()


@torch.no_grad()
def compare(
    report,
    case: str,
    ours: Callable[[Tensor], Tensor],
    eager: Callable[[Tensor], Tensor],
    truth: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(case, ours(x), eager(x), truth(x.double()))
    times = interleave({"repavit_ops": lambda: ours(x), "eager": lambda: eager(x)}, seconds=0.3, rounds=7)
    ratio = times["eager"].p20 / times["repavit_ops"].p20
    report(
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        ratio=ratio,
        ratios={"eager": ratio},
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )


def compare_module(report, module: nn.Module, case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    eager, truth = copy.deepcopy(module), copy.deepcopy(module)
    eager.backend = truth.backend = "reference"
    compare(report, case, module, eager, truth.double(), shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c", "m", "merged", "rows"), FFNS)
def test_ffn(report, c, m, merged, rows, dtype):
    module = drawn(PartialGELUFFN(c, m, merged=merged, norm_eps=1e-6, residual=True), dtype)
    compare_module(report, module, f"ffn C{c} m{m} rows {rows}", (rows, c), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c", "heads", "tokens", "batch"), ATTENTIONS)
def test_attention(report, c, heads, tokens, batch, dtype):
    module = drawn(RepAttention(c, heads, norm_eps=1e-6, residual=True), dtype)
    compare_module(report, module, f"attention C{c} heads {heads} {batch} x {tokens}", (batch, tokens, c), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c", "size", "window", "shift", "batch"), WINDOWS)
def test_windows(report, c, size, window, shift, batch, dtype):
    module = drawn(WindowRepAttention(c, c // 32, window, shift, norm_eps=1e-5, residual=True), dtype)
    case = f"windows C{c} {batch} x {size}x{size} by {window}"
    compare_module(report, module, case, (batch, size, size, c), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "size", "batch"), MODELS)
def test_model(report, name, size, batch, dtype):
    """Small and large images: few tokens, of many images; the eager side is the merged model in the same dtype."""
    merged = repavit_ops.reparameterize(repavit_ops.create_model(name, img_size=size, num_classes=100).eval())
    fused = repavit_ops.fuse(merged, dtype=dtype)
    eager, truth = copy.deepcopy(merged).to(dtype), copy.deepcopy(merged).double()
    compare(report, f"{name} {batch} x {size}", fused, eager, truth, (batch, 3, size, size), dtype)
