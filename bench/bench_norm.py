"""What LayerNorm takes of a block: ``pytest bench/bench_norm.py --threads 1``.

Each operator with and without its norm, in one run: the ratio is the time with it over the time without. Run at two
commits it says what a change of the norm costs a block, (ratio after) / (ratio before) - 1, since the rest is the same.
The last cases are little more than the norm: no hidden channels, nothing merged.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repavit_ops import ops
from repavit_ops.benchmarking.harness import interleave

TOKENS = 197
CASES = [(c, heads, batch) for c, heads in ((192, 3), (384, 6), (768, 12)) for batch in (1, 8)]


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("c", "heads", "batch"), CASES)
@pytest.mark.parametrize("kind", ["ffn", "attention", "norm alone"])
@torch.no_grad()
def test_share_of_the_norm(report, kind, c, heads, batch, dtype):
    x = torch.randn(batch, TOKENS, c, generator=torch.Generator().manual_seed(0)).to(dtype)
    pack = torch.ops.repavit_ops
    if kind == "attention":
        w_qkv, w_proj = drawn(3 * c, c, dtype=dtype), drawn(c, c, dtype=dtype)
        static = {"num_heads": heads, "scale": 0.125, "d_qk": c // heads, "residual": True}
        packed = pack.rep_attention_pack(w_qkv, w_proj, num_heads=heads, d_qk=c // heads)

        def call(norm_eps: float | None) -> Tensor:
            return ops.rep_attention(x, w_qkv, None, w_proj, None, norm_eps=norm_eps, packed=packed, **static)
    else:
        m = c if kind == "ffn" else 0
        w_in, w_out = drawn(m, c, dtype=dtype), drawn(c, max(m, 1), dtype=dtype)[:, :m]
        merged = drawn(c, c, dtype=dtype) if kind == "ffn" else None
        packed = pack.partial_gelu_ffn_pack(w_in, w_out, merged)

        def call(norm_eps: float | None) -> Tensor:
            return ops.partial_gelu_ffn(x, w_in, None, w_out, merged, None, norm_eps=norm_eps, packed=packed)

    times = interleave({"normed": lambda: call(1e-6), "plain": lambda: call(None)})
    ratio = times["normed"].p20 / times["plain"].p20
    report(
        case=f"{kind} C{c} batch {batch}",
        dtype=str(dtype).removeprefix("torch."),
        ratio=ratio,
        ratios={"normed over plain": ratio},
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )
