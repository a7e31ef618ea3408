"""How many operations each operator counts in ``torch.utils.flop_counter``: those of its reference on the meta device.

Like PyTorch's own formulas these count products alone, two operations each, and know nothing but shapes.

``torch.utils.flop_counter`` imports triton where it is installed, 0.1 s and more. So nothing here imports it: whoever
wants a ``FlopCounterMode`` does, and the formulas are registered behind that import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from . import stack_plan

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _linear(rows: int, weight: Shape) -> int:
    return 2 * rows * weight[0] * weight[1]


def partial_gelu_ffn(x: Shape, w_in: Shape, b_in: Any, w_out: Shape, w_merged: Shape | None, *_: Any, **__: Any) -> int:
    rows = math.prod(x[:-1])
    return sum(_linear(rows, w) for w in (w_in, w_out, w_merged) if w is not None)


def gated_ffn(
    x: Shape,
    w_gate: Shape,
    b_gate: Any,
    w_up: Shape,
    b_up: Any,
    w_out: Shape,
    w_merged: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    rows = math.prod(x[:-1])
    return sum(_linear(rows, w) for w in (w_gate, w_up, w_out, w_merged) if w is not None)


def _attention(sequences: int, tokens: int, width: int, out: int) -> int:
    """q kᵀ and softmax(...) v of all heads: 2 d_qk + d_v = width and d_v = out, summed over the heads."""
    return sequences * 2 * tokens * tokens * ((width - out) // 2 + out)


def rep_attention(x: Shape, w_qkv: Shape, b_qkv: Any, w_proj: Shape, *_: Any, **__: Any) -> int:
    batch, tokens, _channels = x
    core = _attention(batch, tokens, w_qkv[0], w_proj[1])
    return _linear(batch * tokens, w_qkv) + core + _linear(batch * tokens, w_proj)


def window_rep_attention(
    x: Shape, w_qkv: Shape, b_qkv: Any, w_proj: Shape, *_: Any, window: Sequence[int], **__: Any
) -> int:
    rows = math.prod(x[:-1])
    return _linear(rows, w_qkv) + _windows(x, w_qkv[0], w_proj[1], window) + _linear(rows, w_proj)


def _windows(x: Shape, width: int, out: int, window: Sequence[int]) -> int:
    """Padded tokens attend like others; they are not projected."""
    count = -(-x[1] // window[0]) * -(-x[2] // window[1])
    return _attention(x[0] * count, window[0] * window[1], width, out)


def patch_projection(
    x: Shape, weight: Shape, *_: Any, patch: Sequence[int], channels_last: bool = False, **__: Any
) -> int:
    down, across = x[1:3] if channels_last else x[2:4]
    return _linear(x[0] * (down // patch[0]) * (across // patch[1]), weight)


def pooled_head(x: Shape, weight: Shape | None, *_: Any, **__: Any) -> int:
    return 0 if weight is None else _linear(x[0], weight)


STEPS: dict[str, Callable[..., int]] = {
    "partial_gelu_ffn": partial_gelu_ffn,
    "gated_ffn": gated_ffn,
    "rep_attention": rep_attention,
    "window_rep_attention": window_rep_attention,
    "patch_projection": patch_projection,
    "token_embedding": patch_projection,
    "pooled_head": pooled_head,
}


def fused_blocks(
    x: Shape,
    weights: Sequence[Any],
    *,
    plan: Sequence[int],
    scalars: Sequence[float],
    **_: Any,
) -> int:
    total = 0
    for step in stack_plan.decode(weights, plan, scalars):
        total += STEPS[step.operator](x, *step.tensors, **step.static)
        x = _shape_behind(step, x)
    return total


def _shape_behind(step: stack_plan.Step, x: Shape) -> Shape:
    if step.operator in stack_plan.IN_BLOCKS or step.operator == "pooled_head":  # nothing stands behind a head
        return x
    last = step.static.get("channels_last", False)
    down, across = x[1:3] if last else x[2:4]
    grid = [down // step.static["patch"][0], across // step.static["patch"][1]]
    outputs = step.tensors[0]
    assert outputs is not None
    if step.operator == "token_embedding" and not step.static["as_map"]:
        prefix = step.tensors[2]
        return [x[0], grid[0] * grid[1] + (0 if prefix is None else prefix[0]), outputs[0]]
    return [x[0], *grid, outputs[0]]


def attention_core(qkv: Shape, *_: Any, num_heads: int, d_qk: int, **__: Any) -> int:
    return _attention(qkv[0], qkv[1], qkv[2], qkv[2] - 2 * num_heads * d_qk)


def window_attention_core(qkv: Shape, *_: Any, num_heads: int, d_qk: int, window: Sequence[int], **__: Any) -> int:
    return _windows(qkv, qkv[3], qkv[3] - 2 * num_heads * d_qk, window)


FORMULAS: dict[str, Callable[..., int]] = {
    name: STEPS[name] for name in (*stack_plan.IN_BLOCKS, "patch_projection")
} | {
    "fused_blocks": fused_blocks,
    "attention_core": attention_core,
    "window_attention_core": window_attention_core,
}


def register(counter: ModuleType) -> None:
    """Tell the module ``torch.utils.flop_counter`` of every formula that it does not know yet."""
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.repavit_ops, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)


def register_when_imported() -> None:
    """Register now if ``torch.utils.flop_counter`` is there, else once somebody imports it."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as everybody else would, and has the formulas registered behind its import; then it is gone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
