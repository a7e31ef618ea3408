"""How the operator ``fused_blocks`` is told its steps: what a schema can carry (tensors, integers, floats) and back.

A step is one sub-block: an operator with all its arguments but x. Every step has the same number of each:

    tensors   0 w_in | w_qkv   1 b_in | b_qkv   2 w_out | w_proj   3 w_merged | b_proj   4 bias | packed
              5 packed | rel_bias   6 - | pad_kv                                 (FFN | attention); absent ones are None
    integers  0 kind   1 residual   2 GELU by tanh | roll first   3 num_heads   4 d_qk   5-6 window   7-8 shift
    scalars   0 scale   1 norm_eps, -1 for no norm

csrc/bindings_fused_blocks.cpp reads the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TENSORS, INTEGERS, SCALARS = 7, 9, 2
KINDS = ("partial_gelu_ffn", "rep_attention", "window_rep_attention")
NO_NORM = -1.0

Plan = tuple[list[Tensor | None], list[int], list[float]]


@dataclass(frozen=True)
class Step:
    """One sub-block: the operator's name, its tensors after x and before ``packed``, and its keyword arguments."""

    operator: str
    tensors: tuple[Tensor | None, ...]
    static: dict[str, Any]
    packed: Tensor | None = None


def encode(steps: Iterable[Step]) -> Plan:
    """Steps → weights, plan and scalars of ``fused_blocks``."""
    weights: list[Tensor | None] = []
    plan: list[int] = []
    scalars: list[float] = []
    for step in steps:
        static = step.static
        eps = static["norm_eps"]
        if step.operator == "partial_gelu_ffn":
            tensors = [*step.tensors, step.packed, None]
            integers = [int(static["approximate"] == "tanh"), 0, 0, 0, 0, 0, 0]
        elif step.operator == "rep_attention":
            tensors = [*step.tensors, step.packed, None, None]
            integers = [0, static["num_heads"], static["d_qk"], 0, 0, 0, 0]
        else:
            *matrices, rel_bias, pad_kv = step.tensors
            tensors = [*matrices, step.packed, rel_bias, pad_kv]
            integers = [int(static["roll_first"]), static["num_heads"], 0, *static["window"], *static["shift"]]
        weights += tensors
        plan += [KINDS.index(step.operator), int(static["residual"]), *integers]
        scalars += [static.get("scale", 1.0), NO_NORM if eps is None else eps]
    return weights, plan, scalars


def decode(weights: Sequence[Tensor | None], plan: Sequence[int], scalars: Sequence[float]) -> Iterator[Step]:
    """Inverse of :func:`encode`."""
    for i in range(len(plan) // INTEGERS):
        tensors = tuple(weights[i * TENSORS : (i + 1) * TENSORS])
        kind, residual, flag, heads, d_qk, *grid = plan[i * INTEGERS : (i + 1) * INTEGERS]
        scale, eps = scalars[i * SCALARS : (i + 1) * SCALARS]
        static: dict[str, Any] = {"residual": bool(residual), "norm_eps": None if eps < 0 else eps}
        operator = KINDS[kind]
        if operator == "partial_gelu_ffn":
            static["approximate"] = "tanh" if flag else "none"
            yield Step(operator, tensors[:5], static, tensors[5])
        elif operator == "rep_attention":
            static |= {"num_heads": heads, "d_qk": d_qk, "scale": scale}
            yield Step(operator, tensors[:4], static, tensors[4])
        else:
            static |= {"num_heads": heads, "scale": scale, "roll_first": bool(flag)}
            static |= {"window": tuple(grid[0:2]), "shift": tuple(grid[2:4])}
            yield Step(operator, (*tensors[:4], *tensors[5:7]), static, tensors[4])
