"""What is timed on a GPU, beside what: operators and whole models, each checked against float64 before it is timed.

A case gives its providers as calls without arguments. Peers do the same job on the same weights in the same dtype:

    eager          the reference formula
    compile        torch.compile, default: the kernels of "reduce-overhead", whose graph is ours here
    max_autotune   torch.compile, "max-autotune-no-cudagraphs": our graph again
    addmm          cuBLASLt's GELU epilogue (tanh) and two products into one result: the strongest hand-made FFN
    flash, cudnn   scaled_dot_product_attention, that backend alone; sdpa: the one that PyTorch chooses
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Call
from harness import check
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import repavit_ops
from repavit_ops import ops, reference
from repavit_ops.kernels.attention import attention, window_attention

OURS = "repavit_ops"
BF16 = torch.bfloat16
TOKENS = 197
PEER_SLACK = 8.0  # times eager's own error that a peer may be off, ours 2
FFN_CHANNELS = (192, 384, 768, 1024, 1280)
BATCHES = (128, 1, 8)
HEADS = ((3, 64), (6, 64), (12, 64), (16, 64), (16, 80))  # of DeiT-T, S, B, ViT-L, ViT-H
STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # map side and channels of Swin-T's stages
FORMS = ("plain", "merged", "vanilla")  # what stands beside fused: both uncompiled, merged compiled, vanilla compiled
# model without its prefix, θ of the paper's speed-up over vanilla
MODELS = {
    **{"deit_tiny": 0.5, "deit_small": 0.5, "deit_base": 0.75, "swin_tiny": 0.75},
    **{"vit_large": 0.75, "vit_huge": 0.75, "swin_small": 0.75, "swin_base": 0.75},
}


@dataclass(frozen=True)
class Case:
    """One line of the results.

    Args:
        part: "ops" or "models". name: what tells it from the others.
        build: (device, compile whole graphs too) → provider → call, all checked.
        flop, bytes: of one call; the least that has to be read and written.
        images: of one call, for images per second; 0 for operators.
    """

    part: str
    name: str
    build: Callable[[torch.device, bool], dict[str, Call]]
    flop: float = 0.0
    bytes: float = 0.0
    images: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def cases(part: str, small: bool = False) -> list[Case]:
    """The cases of a part, those that the issue asks about first; ``small``: one of each kind, tiny."""
    if part == "ops":
        if small:
            return [ffn_case(16, 1), attention_case(2, 16, 1), window_case(14, 32, 1)]
        order = [(c, batch) for batch in BATCHES for c in FFN_CHANNELS]
        first = [ffn_case(c, batch) for c, batch in order[:5]]
        first += [attention_case(h, d, 128) for h, d in HEADS] + [window_case(s, c, 128) for s, c in STAGES]
        rest = [ffn_case(c, batch) for c, batch in order[5:]]
        rest += [attention_case(h, d, batch) for batch in BATCHES[1:] for h, d in HEADS]
        return first + rest + [window_case(s, c, batch) for batch in BATCHES[1:] for s, c in STAGES]
    if small:
        return [model_case("deit_tiny", form, 1, depth=1, img_size=32) for form in FORMS]
    names = list(MODELS)
    order = [("plain", name, batch) for batch in BATCHES[:2] for name in names]
    order += [("merged", name, 128) for name in names[:4]] + [("merged", name, 1) for name in names[:2]]
    order += [("vanilla", name, 128) for name in names]
    order += [(form, name, batch) for batch in BATCHES for form in FORMS for name in names]
    return [model_case(name, form, batch) for form, name, batch in dict.fromkeys(order)]


def randn(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(BF16)


def compiled(function: Callable[..., Any], *args: Any, prefix: str = "") -> dict[str, Call]:
    """torch.compile of ``function`` on these very arguments, in both modes; what does not compile is left out, said."""
    calls: dict[str, Call] = {}
    for name, mode in (("compile", "default"), ("max_autotune", "max-autotune-no-cudagraphs")):
        fast = torch.compile(function, mode=mode, dynamic=False)
        try:
            fast(*args)
        except Exception as error:
            _say_left_out(prefix + name, error)
        else:
            calls[prefix + name] = partial(fast, *args)
    return calls


def _say_left_out(name: str, error: Exception) -> None:
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
            _say_left_out(name, error)
        else:
            right[name] = call
    return right


# --- operators --------------------------------------------------------------------------------------------------------


def ffn_case(c: int, batch: int) -> Case:
    """The deployed FFN with m = C active channels (θ = 0.75)."""
    rows = TOKENS * batch

    def build(device: torch.device, compiles: bool) -> dict[str, Call]:
        x, scale = randn(rows, c, device=device), c**-0.5
        w_in, w_out, w_merged = (randn(c, c, device=device, scale=scale) for _ in range(3))
        b_in, bias = (randn(c, device=device, scale=0.1) for _ in range(2))
        tensors = (x, w_in, b_in, w_out, w_merged, bias)

        def addmm() -> Tensor:
            h = torch._addmm_activation(b_in, x, w_in.t(), use_gelu=True)
            return torch.addmm(bias, x, w_merged.t()).addmm_(h, w_out.t())

        calls = {
            OURS: partial(ops.partial_gelu_ffn, *tensors),
            "eager": partial(reference.partial_gelu_ffn, *tensors),
            "addmm": addmm,
        }
        if compiles:
            calls |= compiled(reference.partial_gelu_ffn, *tensors)
        return checked(calls, calls["eager"](), reference.partial_gelu_ffn(*(t.double() for t in tensors)))

    size = 2 * (2 * rows * c + 3 * c * c + 2 * c)
    return Case("ops", f"ffn C{c} batch {batch}", build, flop=6.0 * rows * c * c, bytes=size)


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

    name = f"attention {tokens}x{d} heads {heads} batch {batch}"
    return Case("ops", name, build, flop=4.0 * batch * heads * tokens**2 * d, bytes=8.0 * batch * tokens * heads * d)


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

    flop = 4.0 * batch * side * side * heads * tokens * 32
    return Case(
        "ops", f"windows {side}x{side}x{c} batch {batch}", build, flop=flop, bytes=8.0 * batch * side * side * c
    )


# --- models -----------------------------------------------------------------------------------------------------------


def model_case(name: str, form: str, batch: int, **options: Any) -> Case:
    """A whole classifier, fused, beside its merged and its vanilla form in plain PyTorch, or one of them compiled.

    Three cases for one model, since a compilation may take longer than a part has time.
    """

    def build(device: torch.device, compiles: bool) -> dict[str, Call]:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        with device:  # weights are drawn there
            trained = repavit_ops.create_model(f"repa_{name}", idle_ratio=MODELS[name], **options).eval()
        side = options.get("img_size", 224)
        images = randn(batch, 3, side, side, device=device)
        fused = repavit_ops.fuse(trained, dtype=BF16)
        calls: dict[str, Call] = {}
        if form != "vanilla":
            merged = repavit_ops.reparameterize(trained)
            calls = _right_forms("merged_", merged, images, form != "plain", compiles, {OURS: partial(fused, images)})
        if form != "merged":
            with device:
                vanilla = repavit_ops.create_model(f"vanilla_{name}", **options).eval()
            calls |= _right_forms("vanilla_", vanilla, images, form != "plain", compiles, {})
        return {OURS: partial(fused, images)} | calls  # fused was checked in the other cases

    suffix = "" if form == "plain" else f" {form} compiled"
    facts = {"idle_ratio": MODELS[name]}
    return Case("models", f"{name} batch {batch}{suffix}", build, images=batch, facts=facts)


def _right_forms(
    prefix: str, model: nn.Module, images: Tensor, compile_it: bool, compiles: bool, calls: dict[str, Call]
) -> dict[str, Call]:
    """``calls`` and a float32 model in bf16, eager or compiled: all that are right on the first images."""
    few = images[:8]
    truth = model.double()(few.double())
    model = model.to(BF16)
    eager = partial(model, images)
    calls = {**calls, prefix + "eager": eager}
    if compile_it and compiles:
        calls |= compiled(model, images, prefix=prefix)
    right = checked({name: _first(call, len(few)) for name, call in calls.items()}, eager()[: len(few)], truth)
    return {name: calls[name] for name in right}


def _first(call: Call, images: int) -> Call:
    return lambda: call()[:images]
