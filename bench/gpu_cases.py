"""The operators that are timed on a GPU, beside what; each checked against float64 before it is timed.

A case gives its providers as calls without arguments. Peers do the same job on the same weights in the same dtype:

    eager          the reference formula
    compile        torch.compile, default: the kernels of "reduce-overhead", whose graph is ours here
    addmm          cuBLASLt's GELU epilogue (tanh) and two products into one result: the strongest hand-made FFN
    flash, cudnn   scaled_dot_product_attention, that backend alone; sdpa: the one that PyTorch chooses
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_models import MODES
from gpu_timing import Call
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from repavit_ops import kernels, ops, reference
from repavit_ops.benchmarking.harness import check
from repavit_ops.kernels.attention import attention, window_attention

OURS = "repavit_ops"
BF16 = torch.bfloat16
TOKENS = 197
PEER_SLACK = 8.0  # times eager's own error that a peer may be off, ours 2
FFN_CHANNELS = (192, 384, 768, 1024, 1280)
HEADS = ((3, 64), (6, 64), (12, 64), (16, 64), (16, 80))  # of DeiT-T, S, B, ViT-L, ViT-H
STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # map side and channels of Swin-T's stages


@dataclass(frozen=True)
class Case:
    """One line of the results.

    Args:
        part: "ops" or "models". name: what tells it from the others.
        build: (device, compile whole graphs too) → provider → call, all checked.
        meta: what ours launches, on meta tensors.
        flop, bytes: of one call; the least that has to be read and written.
        images: of one call, for images per second; 0 for operators.
    """

    part: str
    name: str
    build: Callable[[torch.device, bool], dict[str, Call]]
    meta: Callable[[], object]
    flop: float = 0.0
    bytes: float = 0.0
    images: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def randn(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(BF16)


def compiled(name: str, function: Callable[..., Any], mode: str, *args: Any) -> dict[str, Call]:
    """torch.compile of ``function`` on these very arguments; where it does not compile it is left out, said."""
    fast = torch.compile(function, mode=MODES[mode], dynamic=False)
    try:
        fast(*args)
    except Exception as error:
        say_left_out(name, error)
        return {}
    return {name: partial(fast, *args)}


def say_left_out(name: str, error: Exception) -> None:
    print(f"  {name} left out: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}", flush=True)


def checked(calls: dict[str, Call], eager: Tensor, truth: Tensor, tolerant: float = PEER_SLACK) -> dict[str, Call]:
    """The calls whose results are right. One of ours that is not raises; a wrong or failing peer is left out, said."""
    right = {}
    for name, call in calls.items():
        try:
            check(name, call().reshape(truth.shape), eager, truth, slack=2.0 if name == OURS else tolerant)
        except Exception as error:
            if name == OURS:
                raise
            say_left_out(name, error)
        else:
            right[name] = call
    return right


# --- operators --------------------------------------------------------------------------------------------------------


def addmm_ffn(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, w_merged: Tensor, bias: Tensor) -> Tensor:
    h = torch._addmm_activation(b_in, x, w_in.t(), use_gelu=True)
    return torch.addmm(bias, x, w_merged.t()).addmm_(h, w_out.t())


def meta_ffn(c: int, batch: int) -> list[Tensor]:
    """The tensors of ``ffn_case`` without numbers."""
    shapes = ((TOKENS * batch, c), (c, c), (c,), (c, c), (c, c), (c,))
    return [torch.empty(shape, dtype=BF16, device="meta") for shape in shapes]


def ffn_case(c: int, batch: int) -> Case:
    """The deployed FFN with m = C active channels (θ = 0.75)."""
    rows = TOKENS * batch

    def build(device: torch.device, compiles: bool) -> dict[str, Call]:
        x, scale = randn(rows, c, device=device), c**-0.5
        w_in, w_out, w_merged = (randn(c, c, device=device, scale=scale) for _ in range(3))
        b_in, bias = (randn(c, device=device, scale=0.1) for _ in range(2))
        tensors = (x, w_in, b_in, w_out, w_merged, bias)

        calls = {
            OURS: partial(ops.partial_gelu_ffn, *tensors),
            "eager": partial(reference.partial_gelu_ffn, *tensors),
            "addmm": partial(addmm_ffn, *tensors),
        }
        if compiles:
            calls |= compiled("compile", reference.partial_gelu_ffn, "compile", *tensors)
        return checked(calls, calls["eager"](), reference.partial_gelu_ffn(*(t.double() for t in tensors)))

    size = 2 * (2 * rows * c + 3 * c * c + 2 * c)

    def meta() -> None:
        kernels.launcher("partial_gelu_ffn")(*meta_ffn(c, batch))

    return Case("ops", f"ffn C{c} batch {batch}", build, meta, flop=6.0 * rows * c * c, bytes=size)


def attention_case(heads: int, d: int, batch: int) -> Case:
    """softmax(q kᵀ / √d) v from a packed qkv; peers get views of the same memory, and need not write [B, T, C]."""
    tokens, scale = TOKENS, d**-0.5

    def build(device: torch.device, compiles: bool) -> dict[str, Call]:
        qkv = randn(batch, tokens, 3 * heads * d, device=device)
        q, k, v = qkv.view(batch, tokens, 3, heads, d).permute(2, 0, 3, 1, 4)

        def sdpa(*backend: SDPBackend) -> Call:
            def call() -> Tensor:
                with sdpa_kernel(list(backend)):
                    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

            return call

        def ours() -> Tensor:
            if device.type == "cuda":
                return attention(qkv, None, heads, d, scale)
            return reference.attention_core(qkv, None, heads, d, scale)

        calls = {
            OURS: ours,
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2),
            "flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        }
        truth = reference.attention_core(qkv.double(), None, heads, d, scale)
        return checked(calls, reference.attention_core(qkv, None, heads, d, scale), truth)

    def meta() -> None:
        attention(torch.empty(batch, tokens, 3 * heads * d, dtype=BF16, device="meta"), None, heads, d, scale)

    flop, size = 4.0 * batch * heads * tokens**2 * d, 8.0 * batch * tokens * heads * d
    return Case("ops", f"attention {tokens}x{d} heads {heads} batch {batch}", build, meta, flop=flop, bytes=size)


def window_case(side: int, c: int, batch: int) -> Case:
    """Swin's attention within windows of 7 x 7 from a packed qkv map; "sdpa" is spared partition, roll and mask."""
    window, heads, tokens = (7, 7), c // 32, 49
    shift = (3, 3) if side > 7 else (0, 0)
    static = (heads, 32, 32**-0.5, window, shift, False)

    def build(device: torch.device, compiles: bool) -> dict[str, Call]:
        qkv, rel_bias = randn(batch, side, side, 3 * c, device=device), randn(heads, tokens, tokens, device=device)
        rolled = torch.roll(qkv, (-shift[0], -shift[1]), (1, 2))
        parts = reference.window_partition(rolled, window).split(c, -1)
        q, k, v = (t.view(-1, tokens, heads, 32).transpose(1, 2).contiguous() for t in parts)
        mask = rel_bias.unsqueeze(0)
        if any(shift):
            mask = mask + reference.shift_mask((side, side), window, shift, BF16, device).unsqueeze(1)
            mask = mask.repeat(batch, 1, 1, 1)

        def back(o: Tensor) -> Tensor:
            o = o.transpose(1, 2).reshape(-1, tokens, c)
            return torch.roll(reference.window_reverse(o, window, (side, side), batch), shift, (1, 2))

        def ours() -> Tensor:
            if device.type == "cuda":
                return window_attention(qkv, rel_bias, None, *static)
            return eager()

        eager = partial(reference.window_attention_core, qkv, rel_bias, None, *static)
        truth = reference.window_attention_core(qkv.double(), rel_bias.double(), None, *static)
        sdpa = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)
        checked({"sdpa": lambda: back(sdpa())}, eager(), truth)  # in its own layout, which is not timed
        return checked({OURS: ours, "eager": eager}, eager(), truth) | {"sdpa": sdpa}

    def meta() -> None:
        qkv = torch.empty(batch, side, side, 3 * c, dtype=BF16, device="meta")
        window_attention(qkv, torch.empty(heads, tokens, tokens, dtype=BF16, device="meta"), None, *static)

    flop, size = 4.0 * batch * side * side * heads * tokens * 32, 8.0 * batch * side * side * c
    return Case("ops", f"windows {side}x{side}x{c} batch {batch}", build, meta, flop=flop, bytes=size)
