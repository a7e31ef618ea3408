"""How the operator ``fused_blocks`` is told its steps: what a schema can carry (tensors, integers, floats) and back.

A step is an operator with all its arguments but x: a sub-block, or what stands in front of the blocks, between and
behind them. Every step has the same number of each, absent tensors None:

    tensors   partial_gelu_ffn      w_in, b_in, w_out, w_merged, bias, packed
              gated_ffn             w_gate, b_gate, w_up, b_up, w_out, w_merged, bias, packed
              rep_attention         w_qkv, b_qkv, w_proj, b_proj, packed, attn_bias, rotary_cos, rotary_sin, q_norm,
                                    k_norm
              window_rep_attention  w_qkv, b_qkv, w_proj, b_proj, packed, rel_bias, pad_kv
              patch_projection      weight, bias, packed
              token_embedding       weight, bias, packed, prefix, position, norm_weight, norm_bias
              pooled_head           weight, bias, norm_weight, norm_bias
    integers  0 kind   1 residual   2 form of activation | roll first | channels last | as map   3 num_heads | first
              4 d_qk | count   5-6 window | patch | form of qk_norm, rotary layout   7-8 shift   9 form of norm
              10 form of quantize
    scalars   0 scale   1 norm_eps   2 inner_norm_eps   3 qk_norm_eps; -1 for no such norm

csrc/bindings_fused_blocks.cpp reads the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

TENSORS, INTEGERS, SCALARS = 10, 11, 4
IN_BLOCKS = ("partial_gelu_ffn", "gated_ffn", "rep_attention", "window_rep_attention")  # these keep x's shape
KINDS = (*IN_BLOCKS, "patch_projection", "token_embedding", "pooled_head")
ROTARY = 6  # where a rep_attention has its tables
NO_NORM = -1.0
# Values of ``approximate``, ``activation``, the norms, ``rotary_layout`` and ``quantize``; a plan has the index
# (csrc/cpu/kernels.h).
GELU_FORMS = ("none", "tanh", "quick")
GATES = ("gelu", "gelu_tanh", "gelu_quick", "silu")
NORMS = ("layer", "rms")
ROTARY_LAYOUTS = ("half", "interleaved")
QUANTIZED = ("none", "int8")

Plan = tuple[list[Tensor | None], list[int], list[float]]


@dataclass(frozen=True)
class Step:
    """One step: the operator's name, its tensors after x without ``packed``, and its keyword arguments.

    Names of norms and layouts, and every eps but the first, may be left out where they are the operator's defaults.
    ``pytorch`` are the batches at which a module's step is none of the call's but PyTorch's (cpu_tuning.py).
    """

    operator: str
    tensors: tuple[Tensor | None, ...]
    static: dict[str, Any]
    packed: Tensor | None = None
    pytorch: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class _Form:
    """Where a kind of step keeps what: how many tensors, which is ``packed``, which numbers are which argument."""

    tensors: int
    packed: int | None
    flags: dict[int, str] = field(default_factory=dict)
    numbers: dict[int, str] = field(default_factory=dict)
    pairs: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    scaled: bool = False
    other_eps: dict[int, str] = field(default_factory=dict)


# Arguments whose values are names, and which there are; a plan has the index of one.
NAMED = {
    "approximate": GELU_FORMS,
    "activation": GATES,
    "norm": NORMS,
    "qk_norm": NORMS,
    "rotary_layout": ROTARY_LAYOUTS,
    "quantize": QUANTIZED,
}

_FORMS = {
    "partial_gelu_ffn": _Form(6, 5, flags={1: "residual"}, names={2: "approximate", 9: "norm", 10: "quantize"}),
    "gated_ffn": _Form(
        8,
        7,
        flags={1: "residual"},
        names={2: "activation", 9: "norm", 10: "quantize"},
        other_eps={2: "inner_norm_eps"},
    ),
    "rep_attention": _Form(
        10,
        4,
        flags={1: "residual"},
        numbers={3: "num_heads", 4: "d_qk"},
        names={5: "qk_norm", 6: "rotary_layout", 9: "norm", 10: "quantize"},
        scaled=True,
        other_eps={2: "inner_norm_eps", 3: "qk_norm_eps"},
    ),
    "window_rep_attention": _Form(
        7,
        4,
        flags={1: "residual", 2: "roll_first"},
        numbers={3: "num_heads"},
        pairs={5: "window", 7: "shift"},
        names={9: "norm", 10: "quantize"},
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
        for i, name in form.names.items():
            integers[i] = NAMED[name].index(static.get(name, NAMED[name][0]))
        plan += integers
        numbers = [static["scale"] if form.scaled else 1.0, static["norm_eps"]] + [None] * (SCALARS - 2)
        for i, name in form.other_eps.items():
            numbers[i] = static.get(name)
        scalars += [NO_NORM if number is None else number for number in numbers]
    return weights, plan, scalars


def turned(plan: Plan, rotary: tuple[Tensor, Tensor]) -> Plan:
    """The same steps with rotary tables (cos, sin) for every ``rep_attention``."""
    weights, integers, scalars = plan
    weights, kind = list(weights), KINDS.index("rep_attention")
    for n, which in enumerate(integers[::INTEGERS]):
        if which == kind:
            weights[n * TENSORS + ROTARY : n * TENSORS + ROTARY + 2] = rotary
    return weights, integers, scalars


def decode(weights: Sequence[Tensor | None], plan: Sequence[int], scalars: Sequence[float]) -> Iterator[Step]:
    """Inverse of :func:`encode`."""
    for n in range(len(plan) // INTEGERS):
        integers = plan[n * INTEGERS : (n + 1) * INTEGERS]
        numbers = scalars[n * SCALARS : (n + 1) * SCALARS]
        operator = KINDS[integers[0]]
        form = _FORMS[operator]
        tensors = list(weights[n * TENSORS : n * TENSORS + form.tensors])
        packed = None if form.packed is None else tensors.pop(form.packed)
        static: dict[str, Any] = {}
        if form.scaled:
            static["scale"] = numbers[0]
        for i, name in ({1: "norm_eps"} | form.other_eps).items():
            static[name] = None if numbers[i] < 0 else numbers[i]
        for i, name in form.flags.items():
            static[name] = bool(integers[i])
        for i, name in form.numbers.items():
            static[name] = integers[i]
        for i, name in form.pairs.items():
            static[name] = tuple(integers[i : i + 2])
        for i, name in form.names.items():
            static[name] = _named(name, integers[i])
        yield Step(operator, tuple(tensors), static, packed)


def _named(argument: str, index: int) -> str:
    names = NAMED[argument]
    if not 0 <= index < len(names):
        raise ValueError(f"plan: got a form {index} of {argument}, wanted 0 to {len(names) - 1}")
    return names[index]
