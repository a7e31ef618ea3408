"""The inside of one operator call: how its time divides among its products, which nothing outside of it can see.

Each product is timed alone, by the same kernels on the same sizes; the call's time is divided in these proportions.
What attention takes beyond its two projections is its core's, and that is at least as slow per operation. It is an
estimate: alone, a product finds other things in cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..nn import GatedFFN, PartialGELUFFN, PatchConv2d, PatchProjection, RepAttention, WindowRepAttention
from .parts import CORE, FFN_IN, FFN_OUT, MERGED, PATCH, PROJ, QKV, REST
from .recording import Call

SECONDS, CALLS = 0.02, 5  # of one product: at least
Share = tuple[str, float, int]  # part, seconds, floating-point operations


class Products:
    """Seconds of single products, each size timed once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._known: dict[tuple[int, int, int, bool], float] = {}

    def seconds(self, rows: int, k: int, n: int, norm: bool = False) -> float:
        """Of ``[rows, k] x [k, n]``, behind a LayerNorm core where asked for."""
        key = (rows, k, n, norm)
        if key not in self._known:
            self._known[key] = 0.0 if 0 in key[:3] else self._measure(*key)
        return self._known[key]

    def _measure(self, rows: int, k: int, n: int, norm: bool) -> float:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, rows, k, generator=generator).to(self._dtype)
        weight = torch.randn(n, k, generator=generator).to(self._dtype)
        packed = torch.ops.repavit_ops.patch_projection_pack(weight)
        eps = 1e-6 if norm else None

        def call() -> Any:
            return torch.ops.repavit_ops.patch_projection(
                x, weight, None, packed, patch=[1, 1], channels_last=True, norm_eps=eps
            )

        return shortest(call)


def shortest(call: Callable[[], Any]) -> float:
    """Seconds of the quickest of some calls."""
    call()
    best, began, calls = float("inf"), time.perf_counter(), 0
    while calls < CALLS or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def inside(call: Call, products: Products, is_first: bool) -> list[Share]:
    """What a fused module's call consists of; ``is_first`` where no attention came before it."""
    module: Any = call.module
    size = call.size
    if isinstance(module, PatchConv2d | PatchProjection):
        k = module.weight[0].numel()
        per_patch = k // (size[-1] if getattr(module, "channels_last", False) else size[1])
        rows = torch.Size(size).numel() // size[-1 if getattr(module, "channels_last", False) else 1] // per_patch
        return [(PATCH if is_first else REST, call.seconds, 2 * rows * k * module.weight.shape[0])]
    rows = torch.Size(size[:-1]).numel()
    normed = module.norm_eps is not None
    if isinstance(module, RepAttention):
        return _attention(module, call, rows, normed, products)
    assert isinstance(module, PartialGELUFFN | GatedFFN)
    dim, m = module.dim, module.act_channels
    width = m if isinstance(module, PartialGELUFFN) else 2 * m
    sizes = [(FFN_IN, dim, width, normed), (FFN_OUT, m, dim, False)]
    if module.w_merged is not None:
        sizes.append((MERGED, dim, dim, False))
    alone = [products.seconds(rows, k, n, norm) for _, k, n, norm in sizes]
    scale = call.seconds / (sum(alone) or 1.0)
    return [(part, t * scale, 2 * rows * k * n) for (part, k, n, _), t in zip(sizes, alone, strict=True)]


def _attention(module: RepAttention, call: Call, rows: int, normed: bool, products: Products) -> list[Share]:
    heads, values = module.num_heads, module.num_heads * module.d_v
    width, dim, out = module.w_qkv.shape[0], module.dim, module.w_proj.shape[0]
    qkv, proj = products.seconds(rows, dim, width, normed), products.seconds(rows, values, out)
    keys = module.window[0] * module.window[1] if isinstance(module, WindowRepAttention) else call.size[1]
    flops = (2 * rows * dim * width, 2 * rows * heads * keys * (module.d_qk + module.d_v), 2 * rows * values * out)
    # The remainder is the core's, which takes at least as long for an operation as the products do.
    core = max(call.seconds - qkv - proj, (qkv + proj) * flops[1] / max(1, flops[0] + flops[2]))
    scale = call.seconds / ((qkv + core + proj) or 1.0)
    alone = (qkv, core, proj)
    return [(part, t * scale, n) for part, t, n in zip((QKV, CORE, PROJ), alone, flops, strict=True)]
