"""Every operator of the namespace ``repavit_ops``: schema, reference, fake, autograd and autocast, in one place.

Design:
1. One schema each. Positional arguments are tensors (differentiable, except ``packed``), keyword-only ones are static,
   so autograd, autocast and the reference are registered by the same few lines for every operator.
2. The plain-PyTorch reference is CompositeExplicitAutograd: it serves every device that no kernel claims.
   C++ claims CPU from within its shared library; Triton claims CUDA below, imported at the first call.
3. Gradients recompute the reference formula. No kernel needs a backward of its own to be trainable. Forward-mode
   derivatives are those of the reference, which then runs instead.
4. Under the transforms of ``torch.func`` (vmap, grad, jacrev, …) an operator is its reference, whose parts PyTorch
   knows how to transform.
5. What a tensor argument did not enter, it gets a zero gradient of: pad_kv where nothing was padded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, flop_formulas, reference, stack_plan

NAMESPACE = "repavit_ops"
TRANSFORMS = "FuncTorchDynamicLayerFrontMode"  # the dispatch key of every transform of torch.func, nested or not
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Operator:
    """One operator: its name, the arguments of its schema, its reference and the shape of its result."""

    name: str
    arguments: str
    reference: Callable[..., Tensor]
    result_shape: Callable[..., list[int]]

    def __call__(self, *args: Any, **static: Any) -> Tensor:
        return getattr(torch.ops.repavit_ops, self.name)(*args, **static)

    @property
    def inputs(self) -> int:
        """How many tensors the reference takes: all that stand before ``packed``."""
        return self.arguments.split("Tensor? packed")[0].count("Tensor")

    @property
    def tensor_names(self) -> list[str]:
        """Names of the tensors of the schema, ``packed`` last."""
        return re.findall(r"Tensor\?? (\w+)", self.arguments)


def _same_shape(x: Tensor, *_: Any, **__: Any) -> list[int]:
    return list(x.shape)


def _projected_shape(x: Tensor, w_qkv: Tensor, b_qkv: Tensor | None, w_proj: Tensor, *_: Any, **__: Any) -> list[int]:
    return [*x.shape[:-1], w_proj.shape[0]]


def _grid_shape(x: Tensor, weight: Tensor, *_: Any, patch: list[int], channels_last: bool, **__: Any) -> list[int]:
    if min(patch) < 1:
        raise ValueError(f"patch: got {list(patch)}, wanted numbers >= 1")
    h, w = x.shape[1:3] if channels_last else x.shape[2:4]
    return [x.shape[0], h // patch[0], w // patch[1], weight.shape[0]]


OPERATORS = (
    Operator(
        "partial_gelu_ffn",
        "Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? w_merged, Tensor? bias, Tensor? packed=None, *, "
        "float? norm_eps=None, bool residual=False, str approximate='none', str norm='layer', str quantize='none'",
        reference.partial_gelu_ffn,
        _same_shape,
    ),
    Operator(
        "gated_ffn",
        "Tensor x, Tensor w_gate, Tensor? b_gate, Tensor w_up, Tensor? b_up, Tensor w_out, Tensor? w_merged, "
        "Tensor? bias, Tensor? packed=None, *, str activation, float? norm_eps=None, float? inner_norm_eps=None, "
        "bool residual=False, str norm='layer', str quantize='none'",
        reference.gated_ffn,
        _same_shape,
    ),
    Operator(
        "rep_attention",
        "Tensor x, Tensor w_qkv, Tensor? b_qkv, Tensor w_proj, Tensor? b_proj, Tensor? attn_bias=None, "
        "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? q_norm=None, Tensor? k_norm=None, "
        "Tensor? packed=None, *, int num_heads, float scale, int d_qk, float? norm_eps=None, bool residual=False, "
        "str norm='layer', float? qk_norm_eps=None, str qk_norm='layer', str rotary_layout='half', "
        "float? inner_norm_eps=None, str quantize='none'",
        reference.rep_attention,
        _projected_shape,
    ),
    Operator(
        "window_rep_attention",
        "Tensor x, Tensor w_qkv, Tensor? b_qkv, Tensor w_proj, Tensor? b_proj, Tensor rel_bias, "
        "Tensor? pad_kv=None, Tensor? packed=None, *, int num_heads, float scale, int[2] window, int[2] shift, "
        "float? norm_eps=None, bool residual=False, bool roll_first=False, str norm='layer', str quantize='none'",
        reference.window_rep_attention,
        _projected_shape,
    ),
    Operator(
        "patch_projection",
        "Tensor x, Tensor weight, Tensor? bias, Tensor? packed=None, *, "
        "int[2] patch, bool channels_last, float? norm_eps=None",
        reference.patch_projection,
        _grid_shape,
    ),
)

# Not differentiable, CPU only, implemented by the C++ library alone (csrc/bindings*.cpp).
CPU_TOOLS = (
    "partial_gelu_ffn_pack(Tensor w_in, Tensor w_out, Tensor? w_merged, *, str quantize='none') -> Tensor",
    "partial_gelu_ffn_unpack(Tensor packed) -> Tensor[]",
    "gated_ffn_pack(Tensor w_gate, Tensor w_up, Tensor w_out, Tensor? w_merged, *, str quantize='none') -> Tensor",
    "gated_ffn_unpack(Tensor packed) -> Tensor[]",
    "rep_attention_pack(Tensor w_qkv, Tensor w_proj, *, int num_heads, int d_qk, str quantize='none') -> Tensor",
    "rep_attention_unpack(Tensor packed) -> Tensor[]",
    "patch_projection_pack(Tensor weight) -> Tensor",
    "patch_projection_unpack(Tensor packed) -> Tensor[]",
    # a number that changes with the weights, as far as it sees; and a packed copy whose weights are gone from now on
    "fingerprint(Tensor[] weights) -> int",
    "packed_stands_alone(Tensor(a!) packed) -> ()",
    # for benchmarks: products of like's dtype (int8: as quantized weights have them) in registers, on all threads;
    # returns how many operations that was
    "product_peak(Tensor like, int iterations) -> int",
    # the attention itself, without weights: for benchmarks and tests
    "attention_core(Tensor qkv, Tensor? bias, *, int num_heads, int d_qk, float scale) -> Tensor",
    "window_attention_core(Tensor qkv, Tensor rel_bias, Tensor? padding, *, int num_heads, int d_qk, float scale, "
    "int[2] window, int[2] shift, bool roll_first=False) -> Tensor",
    # a plan of fused_blocks that is read once: its number, calls by number, and the end of it (nn/kept_plan.py)
    "fused_blocks_keep(Tensor?[] weights, int[] plan, float[] scalars) -> int",
    "fused_blocks_kept(Tensor x, int kept, Tensor? rotary_cos=None, Tensor? rotary_sin=None) -> Tensor",
    "fused_blocks_drop(int kept) -> ()",
    "cpu_isa() -> int",
    # why that is not AMX, which the processor has (backends.AMX_REFUSALS); 0: no reason
    "amx_refusal() -> int",
    # scratch that the kernels of all threads hold now, kept from call to call
    "scratch_bytes() -> int",
    # back to the system, where the C library can
    "release_freed_memory() -> ()",
)


def refuse_onnx() -> None:
    """Raise RuntimeError while torch.onnx.export runs on a program that holds these operators, which ONNX lacks.

    It never comes here from a model, whose functional forms run their formulas meanwhile (``backends.wants_formula``).
    """
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "repavit_ops: this program holds operators that ONNX has not; hand torch.onnx.export the model itself in "
            "place of what torch.export made of it, and its formulas are exported"
        )


def _one_device(x: Tensor, others: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise ValueError unless all tensors are where x is. One of them on the meta device is enough for the fake to be
    asked, and what it returns for an x elsewhere would be memory that nobody wrote."""
    for name, t in others:
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, but x is on {x.device}; move one with .to(...)")


def _dense(tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise ValueError for sparse tensors: PyTorch hands those to the formula, past the kernels' own checks."""
    for name, t in tensors:
        if t is not None and t.layout is not torch.strided:
            raise ValueError(f"{name}: got a tensor of layout {t.layout}, wanted a dense one: {name}.to_dense()")


def _known(static: Mapping[str, Any]) -> None:
    """Raise ValueError for what the formulas would divide by, or look up: no tokens to a window, names of no form."""
    for name in ("patch", "window"):
        if any(n < 1 for n in static.get(name, ())):
            raise ValueError(f"{name}: got {list(static[name])}, wanted at least 1 each")
    for name, known in stack_plan.NAMED.items():
        if static.get(name, known[0]) not in known:
            raise ValueError(f"{name}: got {static[name]!r}, wanted one of {', '.join(known)}")


def _register(operator: Operator) -> None:
    _LIBRARY.define(f"{operator.name}({operator.arguments}) -> Tensor")
    qualified = f"{NAMESPACE}::{operator.name}"

    def composite(*tensors: Tensor | None, **static: Any) -> Tensor:
        _dense(zip(operator.tensor_names, tensors, strict=False))
        _known(static)
        return operator.reference(*tensors[: operator.inputs], **static)

    def fake(x: Tensor, *others: Tensor | None, **static: Any) -> Tensor:
        refuse_onnx()
        _one_device(x, zip(operator.tensor_names[1:], others, strict=False))
        _known(static)
        return x.new_empty(operator.result_shape(x, *others, **static))

    _LIBRARY.impl(operator.name, composite, "CompositeExplicitAutograd")
    _LIBRARY.impl(operator.name, composite, TRANSFORMS)
    _LIBRARY.impl(operator.name, _triton(operator.name, operator.reference, operator.inputs), "CUDA")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, _backward(operator), setup_context=_save_inputs, lib=_LIBRARY)
    for device_type in ("cpu", "cuda"):
        _LIBRARY.impl(operator.name, _autocast(operator, device_type), f"Autocast{device_type.upper()}")


def _triton(name: str, formula: Callable[..., Tensor], inputs: int) -> Callable[..., Tensor]:
    """The CUDA implementation: the Triton launcher; the reference where triton is missing, and for float64."""

    def run(x: Tensor, *tensors: Any, **static: Any) -> Tensor:
        arguments = (x, *tensors)[:inputs]
        _known(static)
        if x.dtype == torch.float64 or not backends.has_triton_kernel(name):
            return formula(*arguments, **static)
        with torch.cuda.device(x.device):
            return backends.triton_launcher(name)(*arguments, **static)

    return run


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.static = keyword_only_inputs


def _backward(operator: Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    n = operator.inputs

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        with torch.enable_grad():
            # Views, not the tensors themselves: their hooks must not fire twice, yet double backward needs the link.
            views = [t.view_as(t) if t is not None else None for t in tensors]
            y = operator.reference(*views[:n], **ctx.static)
        wanted = [i < n and v is not None and v.requires_grad for i, v in enumerate(views)]
        leaves: list[Any] = [v for v, want in zip(views, wanted, strict=True) if want]
        if y.requires_grad:
            create_graph = torch.is_grad_enabled()
            grads = iter(torch.autograd.grad(y, leaves, grad, create_graph=create_graph, materialize_grads=True))
        else:  # none of them entered
            grads = map(torch.zeros_like, leaves)
        return tuple(next(grads) if want else None for want in wanted)

    return backward


def _stays_wide(name: str, t: Tensor | None) -> bool:
    """Whether autocast leaves a tensor as it is: tables of float32, which stand beside tokens of any dtype."""
    return name in ("rotary_cos", "rotary_sin") and t is not None and t.dtype == torch.float32


def _autocast(operator: Operator, device_type: str) -> Callable[..., Tensor]:
    def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if t is None or not t.is_floating_point() or t.dtype is torch.float64:
            return t
        return t.to(dtype)

    def run(*tensors: Tensor | None, **static: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            # Packed weights are those of the stored dtype, so they stay behind.
            given = zip(operator.tensor_names, tensors[: operator.inputs], strict=False)
            return operator(*(t if _stays_wide(name, t) else cast(t, dtype) for name, t in given), **static)

    return run


def _register_fused_blocks() -> None:
    """The run of steps: inference only. Where a gradient is wanted its steps run apart, differentiable."""
    name = "fused_blocks"
    _LIBRARY.define(f"{name}(Tensor x, Tensor?[] weights, *, int[] plan, float[] scalars) -> Tensor")

    def formula(x: Tensor, weights: list[Tensor | None], *, plan: list[int], scalars: list[float]) -> Tensor:
        _check_plan(weights, plan, scalars)
        _dense((("x", x), *((f"weights[{i}]", w) for i, w in enumerate(weights))))
        return reference.fused_blocks(x, weights, plan=plan, scalars=scalars)

    def fake(x: Tensor, weights: list[Tensor | None], *, plan: list[int], scalars: list[float]) -> Tensor:
        refuse_onnx()
        _check_plan(weights, plan, scalars)
        _one_device(x, ((f"weights[{i}]", w) for i, w in enumerate(weights)))
        for step in stack_plan.decode(weights, plan, scalars):
            if step.operator not in stack_plan.IN_BLOCKS:
                x = reference.run_step(step, x)
        return x.new_empty(x.shape)

    def autograd(x: Tensor, weights: list[Tensor | None], *, plan: list[int], scalars: list[float]) -> Tensor:
        tensors = [x, *(w for w in weights if w is not None)]
        if backends.in_forward_mode() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return formula(x, weights, plan=plan, scalars=scalars)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.repavit_ops.fused_blocks(x, weights, plan=plan, scalars=scalars)

    _LIBRARY.impl(name, formula, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, formula, TRANSFORMS)
    _LIBRARY.impl(name, _triton(name, formula, 2), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, autograd, "Autograd")


def _check_plan(weights: Sequence[Tensor | None], plan: Sequence[int], scalars: Sequence[float]) -> None:
    """Raise ValueError unless these are the parts of a plan, as long as one another and of known kinds."""
    each = (stack_plan.INTEGERS, stack_plan.TENSORS, stack_plan.SCALARS)
    steps = len(plan) // stack_plan.INTEGERS
    if steps == 0 or (len(plan), len(weights), len(scalars)) != tuple(steps * n for n in each):
        raise ValueError(
            f"plan: got {len(plan)} integers, {len(weights)} weights and {len(scalars)} scalars, "
            f"wanted {each[0]}, {each[1]} and {each[2]} for each step"
        )
    for kind in plan[:: stack_plan.INTEGERS]:
        if not 0 <= kind < len(stack_plan.KINDS):
            raise ValueError(f"plan: got a step of kind {kind}, wanted 0 to {len(stack_plan.KINDS) - 1}")


for _operator in OPERATORS:
    _register(_operator)
_register_fused_blocks()
for _schema in CPU_TOOLS:
    _LIBRARY.define(_schema)
backends.load_cpp()
flop_formulas.register_when_imported()
