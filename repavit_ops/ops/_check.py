"""Argument checks that every functional operator shares: what came, what was wanted, and the fix, in one line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference_int8
from ..stack_plan import GATES, GELU_FORMS, NORMS, QUANTIZED, ROTARY_LAYOUTS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(name: str, t: Tensor, *wanted: int | str) -> None:
    """Raise ValueError unless ``t`` has this shape; a str stands for any size and names it in the message."""
    if t.dim() == len(wanted) and all(isinstance(w, str) or w == s for w, s in zip(wanted, t.shape, strict=True)):
        return
    text = ", ".join(str(w) for w in wanted)
    raise ValueError(f"{name}: got shape {list(t.shape)}, wanted [{text}]")


def same_kind(x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless every tensor is a float of x's dtype on x's device."""
    if x.dtype not in FLOATS:
        raise ValueError(f"x: got {x.dtype}, wanted float32, bfloat16, float16 or float64; cast it with x.to(...)")
    for name, t in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, but x is on {x.device}; move one with .to(...)")
        if t.dtype != x.dtype and not (t.dtype in FLOATS and _autocast_casts(x.device.type)):
            raise ValueError(f"{name}: got {t.dtype}, but x is {x.dtype}; cast one with .to(...)")


def packed(x: Tensor, buffer: Tensor | None) -> None:
    """Raise ValueError unless the packed weights, if any, are where x is."""
    if buffer is not None and buffer.device != x.device:
        raise ValueError(f"packed: on {buffer.device}, but x is on {x.device}; pack the weights again")


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number or two; raise ValueError for what is neither."""
    numbers = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value, value)
    if len(numbers) != 2 or not all(isinstance(n, (int, torch.SymInt)) for n in numbers):
        raise ValueError(f"{name}: got {value!r}, wanted one number or (height, width)")
    return numbers


def _autocast_casts(device_type: str) -> bool:
    return backends.has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def norm(eps: float | None, form: str = "layer", name: str = "norm") -> None:
    """Raise ValueError unless ``eps`` is None or a variance offset and ``form`` names a norm."""
    if eps is not None and not eps >= 0:
        raise ValueError(f"{name}_eps: got {eps}, wanted None (no norm) or a number >= 0 such as 1e-6")
    if form not in NORMS:
        raise ValueError(f"{name}: got {form!r}, wanted 'layer' (LayerNorm) or 'rms' (RMSNorm)")


def rotary(x: Tensor, cos: Tensor | None, sin: Tensor | None, layout: str, num_heads: int, d_qk: int) -> None:
    """Raise ValueError unless the rotary tables fit the heads of x [B, T, C], or there are none."""
    batch, tokens = x.shape[:2]
    if layout not in ROTARY_LAYOUTS:
        raise ValueError(f"rotary_layout: got {layout!r}, wanted 'half' or 'interleaved'")
    if cos is None or sin is None:
        if cos is not sin:
            given, missing = ("rotary_cos", "rotary_sin") if sin is None else ("rotary_sin", "rotary_cos")
            raise ValueError(f"{missing}: got None beside {given}; pass both or none")
        return
    if cos.dim() < 2 or cos.shape[-2] > tokens or cos.shape[-1] > d_qk or cos.shape[-1] % 2:
        raise ValueError(
            f"rotary_cos: got shape {list(cos.shape)}, wanted [.., tokens, width] with at most {tokens} tokens and an "
            f"even width of at most d_qk = {d_qk}"
        )
    wanted = (batch, num_heads, *cos.shape[-2:])
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        sizes = (1,) * (4 - table.dim()) + tuple(table.shape)
        fits = len(sizes) == 4 and sizes[2:] == wanted[2:]
        if not fits or any(s not in (1, w) for s, w in zip(sizes[:2], wanted, strict=False)):
            raise ValueError(
                f"{name}: got shape {list(table.shape)}, wanted one that broadcasts to [B, h, tokens, width] = "
                f"{list(wanted)}"
            )
        if table.device != x.device:
            raise ValueError(f"{name}: on {table.device}, but x is on {x.device}; move one with .to(...)")
        if table.dtype not in (x.dtype, torch.float32) or (table.dtype != x.dtype == torch.float64):
            raise ValueError(f"{name}: got {table.dtype}, wanted {x.dtype} as x or float32; cast it with .to(...)")


def qk_norm(eps: float | None, form: str, q_norm: Tensor | None, k_norm: Tensor | None, d_qk: int) -> None:
    """Raise ValueError unless QK-norm has its eps and both affine maps, or nothing."""
    norm(eps, form, "qk_norm")
    for name, affine in (("q_norm", q_norm), ("k_norm", k_norm)):
        if (affine is None) != (eps is None):
            raise ValueError(
                f"{name}: got {'None beside' if affine is None else 'a tensor without'} qk_norm_eps; QK-norm takes it, "
                "q_norm and k_norm, or none"
            )
        if affine is not None:
            shape(name, affine, 2, d_qk)


def form_of_quantize(quantize: str) -> None:
    """Raise ValueError unless ``quantize`` names a form of weights."""
    if quantize not in QUANTIZED:
        raise ValueError(f"quantize: got {quantize!r}, wanted 'none' or 'int8'")


def quantized(x: Tensor, quantize: str, *weights: Tensor | None) -> None:
    """Raise ValueError unless ``quantize`` names a form that these weights and tokens have, here."""
    form_of_quantize(quantize)
    if quantize == "none":
        return
    if x.dtype == torch.float64:
        raise ValueError(
            "quantize: 'int8' is for float32, bfloat16 and float16, got float64; convert with .float(), or 'none'"
        )
    deepest = max(w.shape[1] for w in weights if w is not None)
    if deepest > reference_int8.DEPTH:
        raise ValueError(
            f"quantize: got weights of {deepest} inputs, wanted at most {reference_int8.DEPTH}, whose sums int32 "
            "holds; leave these at 'none'"
        )


def gate_form(activation: str) -> None:
    """Raise ValueError unless ``activation`` names what a gated FFN can multiply by."""
    if activation not in GATES:
        raise ValueError(f"activation: got {activation!r}, wanted 'silu', 'gelu' (erf), 'gelu_tanh' or 'gelu_quick'")


def gelu_form(approximate: str) -> None:
    """Raise ValueError unless ``approximate`` names a form of GELU."""
    if approximate not in GELU_FORMS:
        raise ValueError(
            f"approximate: got {approximate!r}, wanted 'none' (erf), 'tanh' or 'quick' (x sigmoid(1.702 x))"
        )


def heads(num_heads: int, d_qk: int, w_qkv: Tensor, w_proj: Tensor) -> int:
    """Raise ValueError unless qkv and proj widths fit the heads; return d_v."""
    if num_heads < 1:
        raise ValueError(f"num_heads: got {num_heads}, wanted at least 1")
    if w_proj.dim() != 2 or w_proj.shape[1] % num_heads:
        raise ValueError(f"w_proj: got shape {list(w_proj.shape)}, wanted [C_out, num_heads * d_v], {num_heads=}")
    d_v = w_proj.shape[1] // num_heads
    wanted = num_heads * (2 * d_qk + d_v)
    if d_qk < 1 or w_qkv.dim() != 2 or w_qkv.shape[0] != wanted:
        raise ValueError(
            f"w_qkv: got shape {list(w_qkv.shape)}, wanted [num_heads * (2 * d_qk + d_v) = {wanted}, C] "
            f"for {num_heads=}, {d_qk=}, {d_v=}"
        )
    return d_v
