"""How the operator ``fused_blocks`` is told its steps: what a schema can carry (tensors, integers, floats) and back.

A step is an operator with all its arguments but x: a sub-block, or what stands in front of the blocks, between and
behind them. Every step has the same number of each, absent tensors None:

    tensors   partial_gelu_ffn      w_in, b_in, w_out, w_merged, bias, packed
              rep_attention         w_qkv, b_qkv, w_proj, b_proj, packed
              window_rep_attention  w_qkv, b_qkv, w_proj, b_proj, packed, rel_bias, pad_kv
              patch_projection      weight, bias, packed
              token_embedding       weight, bias, packed, prefix, position, norm_weight, norm_bias
              pooled_head           weight, bias, norm_weight, norm_bias
    integers  0 kind   1 residual   2 form of GELU | roll first | channels last | as map   3 num_heads | first
              4 d_qk | count   5-6 window | patch   7-8 shift
    scalars   0 scale   1 norm_eps, -1 for no norm

csrc/bindings_fused_blocks.cpp reads the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

TENSORS, INTEGERS, SCALARS = 7, 9, 2
IN_BLOCKS = ("partial_gelu_ffn", "rep_attention", "window_rep_attention")  # these keep x's shape
KINDS = (*IN_BLOCKS, "patch_projection", "token_embedding", "pooled_head")
NO_NORM = -1.0
GELU_FORMS = ("none", "tanh", "quick")  # values of ``approximate``; a plan has the index, as csrc/cpu/kernels.h

Plan = tuple[list[Tensor | None], list[int], list[float]]


@dataclass(frozen=True)
class Step:
    """One step: the operator's name, its tensors after x without ``packed``, and its keyword arguments."""

    operator: str
    tensors: tuple[Tensor | None, ...]
    static: dict[str, Any]
    packed: Tensor | None = None


@dataclass(frozen=True)
class _Form:
    """Where a kind of step keeps what: how many tensors, which is ``packed``, which integers are which argument."""

    tensors: int
    packed: int | None
    flags: dict[int, str] = field(default_factory=dict)
    numbers: dict[int, str] = field(default_factory=dict)
    pairs: dict[int, str] = field(default_factory=dict)
    scaled: bool = False
    gelu: int | None = None


_FORMS = {
    "partial_gelu_ffn": _Form(6, 5, flags={1: "residual"}, gelu=2),
    "rep_attention": _Form(5, 4, flags={1: "residual"}, numbers={3: "num_heads", 4: "d_qk"}, scaled=True),
    "window_rep_attention": _Form(
        7,
        4,
        flags={1: "residual", 2: "roll_first"},
        numbers={3: "num_heads"},
        pairs={5: "window", 7: "shift"},
        scaled=True,
    ),
    "patch_projection": _Form(3, 2, flags={2: "channels_last"}, pairs={5: "patch"}),
    "token_embedding": _Form(7, 2, flags={2: "as_map"}, pairs={5: "patch"}),
    "pooled_head": _Form(4, None, numbers={3: "first", 4: "count"}),
}


def encode(steps: Iterable[Step]) -> Plan:
    """Steps → weights, plan and scalars of ``fused_blocks``."""
    weights: list[Tensor | None] = []
    plan: list[int] = []
    scalars: list[float] = []
    for step in steps:
        form, static = _FORMS[step.operator], step.static
        tensors = list(step.tensors)
        if form.packed is not None:
            tensors.insert(form.packed, step.packed)
        weights += tensors + [None] * (TENSORS - len(tensors))
        integers = [KINDS.index(step.operator)] + [0] * (INTEGERS - 1)
        for i, name in form.flags.items():
            integers[i] = int(static[name])
        for i, name in form.numbers.items():
            integers[i] = static[name]
        for i, name in form.pairs.items():
            integers[i : i + 2] = static[name]
        if form.gelu is not None:
            integers[form.gelu] = GELU_FORMS.index(static["approximate"])
        plan += integers
        eps = static["norm_eps"]
        scalars += [static["scale"] if form.scaled else 1.0, NO_NORM if eps is None else eps]
    return weights, plan, scalars


def decode(weights: Sequence[Tensor | None], plan: Sequence[int], scalars: Sequence[float]) -> Iterator[Step]:
    """Inverse of :func:`encode`."""
    for n in range(len(plan) // INTEGERS):
        integers = plan[n * INTEGERS : (n + 1) * INTEGERS]
        scale, eps = scalars[n * SCALARS : (n + 1) * SCALARS]
        operator = KINDS[integers[0]]
        form = _FORMS[operator]
        tensors = list(weights[n * TENSORS : n * TENSORS + form.tensors])
        packed = None if form.packed is None else tensors.pop(form.packed)
        static: dict[str, Any] = {"norm_eps": None if eps < 0 else eps}
        if form.scaled:
            static["scale"] = scale
        for i, name in form.flags.items():
            static[name] = bool(integers[i])
        for i, name in form.numbers.items():
            static[name] = integers[i]
        for i, name in form.pairs.items():
            static[name] = tuple(integers[i : i + 2])
        if form.gelu is not None:
            static["approximate"] = _gelu_form(integers[form.gelu])
        yield Step(operator, tuple(tensors), static, packed)


def _gelu_form(index: int) -> str:
    if not 0 <= index < len(GELU_FORMS):
        raise ValueError(f"plan: got a GELU of form {index}, wanted 0 to {len(GELU_FORMS) - 1}")
    return GELU_FORMS[index]
