"""What the fuzzers draw: operators with all of their arguments, tensors in any layout, and arguments that fit nothing.

REPAVIT_FUZZ is the number of examples of each property: some tens by default, thousands under ``make fuzz``. The
contents of tensors come from one seed per example, so that hypothesis shrinks shapes, layouts and options.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from repavit_ops import ops, reference
from repavit_ops.stack_plan import Step

OP = torch.ops.repavit_ops
EXAMPLES = int(os.environ.get("REPAVIT_FUZZ", "30"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# hypothesis prefers what stands first and last: an empty tensor proves little, so 0 stands between
SIZES = st.sampled_from((8, 33, 7, 16, 65, 31, 0, 1, 48, 2, 3, 32, 5))
SMALL = st.sampled_from((2, 1, 3, 0, 4, 5))
PRESENT = st.sampled_from((True, False))
INTEGERS = st.one_of(
    st.sampled_from((-(2**63), -(2**62), -(2**32), -1, 0, 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64)),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-3, 70),
)
SIDES = st.sampled_from((7, 5, 12, 8, 0, 13, 3, 2, 1, 20))
WIDTHS = (8, 5, 16, 3, 20, 13, 1, 2)
STRANGE = st.one_of(
    INTEGERS,
    st.sampled_from((None, True, "", "none", "tanh", "no such", (), (1,), (1, 2, 3), [2, 2], {}, b"", 1.5, 0.0, -1e-6)),
    st.sampled_from((float("nan"), float("inf"), -float("inf"), 1e308, 5e-324)),
    st.tuples(INTEGERS, INTEGERS),
)
fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 100,  # CI finds the same every time; the long form looks elsewhere at each run
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@dataclass(repr=False)
class Call:
    """An operator by name, its tensors in the schema's order without ``packed``, and its keyword arguments."""

    name: str
    tensors: list[Any]
    static: dict[str, Any]
    packed: Any = None

    def __repr__(self) -> str:
        shapes = [
            f"{t.dtype}{list(t.shape)}{t.stride()}+{t.storage_offset()}" if _is_dense(t) else repr(t)[:60]
            for t in self.tensors
        ]
        return f"{self.name}({', '.join(shapes)}, {self.static}, packed={self.packed is not None})"

    def run(self, backend: str = "cpp", tensors: list[Any] | None = None) -> Tensor:
        """The public function on these arguments, or on other tensors."""
        x, *rest = self.tensors if tensors is None else tensors
        static = dict(self.static)
        if self.name == "rep_attention":
            *rest, static["attn_bias"], static["rotary_cos"], static["rotary_sin"] = rest[:-2]
            static["q_norm"], static["k_norm"] = self.tensors[-2:] if tensors is None else tensors[-2:]
        if self.name == "window_rep_attention":
            *rest, static["rel_bias"], static["pad_kv"] = rest
        return getattr(ops, self.name)(x, *rest, packed=self.packed, backend=backend, **static)

    def registered(self) -> Tensor:
        """The registered operator itself, without the checks of Python."""
        return getattr(OP, self.name)(*self.tensors, self.packed, **self.static)

    def truth(self, tensors: list[Any] | None = None) -> Tensor:
        """The reference, in the dtype of the tensors."""
        formula = getattr(reference, self.name)
        return formula(*(self.tensors if tensors is None else tensors), **self.static)

    def pack(self) -> Tensor:
        """The packed weights that belong to these arguments."""
        quantize = {"quantize": self.static.get("quantize", "none")}
        if self.name == "partial_gelu_ffn":
            return OP.partial_gelu_ffn_pack(self.tensors[1], self.tensors[3], self.tensors[4], **quantize)
        if self.name == "gated_ffn":
            return OP.gated_ffn_pack(*(self.tensors[i] for i in (1, 3, 5, 6)), **quantize)
        if self.name == "patch_projection":
            return OP.patch_projection_pack(self.tensors[1])
        d_qk = self.static.get("d_qk")
        if d_qk is None:
            d_qk = (self.tensors[1].shape[0] - self.tensors[3].shape[1]) // (2 * self.static["num_heads"])
        heads = {"num_heads": self.static["num_heads"], "d_qk": d_qk}
        return OP.rep_attention_pack(self.tensors[1], self.tensors[3], **heads, **quantize)


def _is_dense(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta


def require_message(error: BaseException) -> None:
    """Raise AssertionError for an error that says nothing."""
    if not str(error):
        raise AssertionError(f"{type(error).__name__} without a message") from error


class Numbers:
    """Seeded tensors of one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def matrix(self, rows: int, columns: int) -> Tensor:
        return self(rows, columns, scale=max(columns, 1) ** -0.5)


@st.composite
def laid_out(draw: Any, t: Tensor) -> Tensor:
    """The same numbers elsewhere in memory: transposed, at an odd offset, every second one, or broadcast."""
    kind = draw(st.sampled_from(("plain", "plain", "transposed", "offset", "strided", "widened")))
    if kind == "transposed" and t.dim() > 1:
        a, b = draw(st.permutations(range(t.dim())))[:2]
        return t.transpose(a, b).contiguous().transpose(a, b)
    if kind == "offset":
        offset = draw(st.integers(1, 9))
        return torch.cat((t.new_full((offset,), float("nan")), t.reshape(-1)))[offset:].view(t.shape)
    if kind == "strided" and t.dim():
        dim = draw(st.integers(0, t.dim() - 1))
        doubled = t.repeat_interleave(2, dim)
        return doubled[(slice(None),) * dim + (slice(None, None, 2),)]
    if kind == "widened" and t.dim():
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    return t


def maybe(strategy: Any) -> Any:
    return st.one_of(st.none(), strategy)


@st.composite
def ffn_calls(draw: Any, numbers: Numbers) -> Call:
    c, m = draw(SIZES), draw(SIZES)
    lead = draw(st.lists(SMALL, max_size=3))
    b_in, w_merged, bias = (
        numbers(m, scale=0.3) if draw(PRESENT) else None,
        numbers.matrix(c, c) if draw(PRESENT) else None,
        numbers(c, scale=0.3) if draw(PRESENT) else None,
    )
    tensors = [numbers(*lead, c), numbers.matrix(m, c), b_in, numbers.matrix(c, m), w_merged, bias]
    static = {"residual": draw(st.booleans()), "approximate": draw(st.sampled_from(("none", "tanh", "quick")))}
    return Call("partial_gelu_ffn", tensors, static)


@st.composite
def gated_calls(draw: Any, numbers: Numbers) -> Call:
    c, m = draw(SIZES), draw(SIZES)
    lead = draw(st.lists(SMALL, max_size=3))
    b_gate, b_up = (numbers(m, scale=0.3) if draw(PRESENT) else None for _ in range(2))
    w_merged = numbers.matrix(c, c) if draw(PRESENT) else None
    bias = numbers(c, scale=0.3) if draw(PRESENT) else None
    weights = [numbers.matrix(m, c), b_gate, numbers.matrix(m, c), b_up, numbers.matrix(c, m), w_merged, bias]
    static = {
        "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from(("silu", "gelu", "gelu_tanh", "gelu_quick"))),
        "inner_norm_eps": draw(st.sampled_from((None, None, 1e-2))),
    }
    return Call("gated_ffn", [numbers(*lead, c), *weights], static)


def _heads(draw: Any) -> tuple[int, int, int]:
    return draw(st.sampled_from((2, 3, 1, 4))), draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))


def _projections(draw: Any, numbers: Numbers, c: int, c_out: int, h: int, d_qk: int, d_v: int) -> list[Any]:
    width = h * (2 * d_qk + d_v)
    b_qkv = numbers(width, scale=0.3) if draw(PRESENT) else None
    b_proj = numbers(c_out, scale=0.3) if draw(PRESENT) else None
    return [numbers.matrix(width, c), b_qkv, numbers.matrix(c_out, h * d_v), b_proj]


@st.composite
def attention_calls(draw: Any, numbers: Numbers) -> Call:
    h, d_qk, d_v = _heads(draw)
    c, residual = draw(SIZES), draw(st.booleans())
    c_out = c if residual else draw(SIZES)
    b, t = draw(st.sampled_from((2, 1, 3, 0, 1, 2, 3))), draw(st.sampled_from((5, 17, 8, 33, 0, 49, 2, 1, 70)))
    attn_bias = None
    if draw(PRESENT):
        full = (b, h, t, t)
        kept = draw(st.integers(0, 4))
        shape = tuple(s if draw(st.booleans()) else 1 for s in full[4 - kept :])
        attn_bias = numbers(*shape)
        if draw(st.booleans()):
            hidden = torch.rand(shape, generator=numbers.generator) < 0.4
            attn_bias = attn_bias.masked_fill(hidden, float("-inf"))
    x = numbers(b, t, c)
    static = {
        "num_heads": h,
        "scale": draw(st.sampled_from((1.0, 0.25, -0.5, 0.0))),
        "d_qk": d_qk,
        "residual": residual,
        "rotary_layout": draw(st.sampled_from(("half", "interleaved"))),
        "inner_norm_eps": draw(st.sampled_from((None, None, 1e-2))),
    }
    cos = sin = q_norm = k_norm = None
    if draw(st.booleans()):
        tokens, width = draw(st.integers(0, t)), 2 * draw(st.integers(0, d_qk // 2))
        lead = tuple(s if draw(st.booleans()) else 1 for s in (b, h))[2 - draw(st.integers(0, 2)) :]
        cos, sin = numbers(*lead, tokens, width), numbers(*lead, tokens, width)
    if draw(st.booleans()):
        q_norm, k_norm = numbers(2, d_qk), numbers(2, d_qk)
        static |= {"qk_norm_eps": 1e-2, "qk_norm": draw(st.sampled_from(("layer", "rms")))}
    projections = _projections(draw, numbers, c, c_out, h, d_qk, d_v)
    return Call("rep_attention", [x, *projections, attn_bias, cos, sin, q_norm, k_norm], static)


@st.composite
def window_calls(draw: Any, numbers: Numbers) -> Call:
    h, d_qk, d_v = _heads(draw)
    c, residual = draw(SIZES), draw(st.booleans())
    c_out = c if residual else draw(SIZES)
    window = [draw(st.integers(1, 7)), draw(st.integers(1, 7))]
    shift = [draw(st.integers(0, edge - 1)) for edge in window]
    x = numbers(draw(st.sampled_from((2, 1, 0, 2, 1))), draw(SIDES), draw(SIDES), c)
    tokens = window[0] * window[1]
    pad_kv = numbers(h * (d_qk + d_v), scale=0.3) if draw(PRESENT) else None
    parts = _projections(draw, numbers, c, c_out, h, d_qk, d_v)
    static = {"num_heads": h, "scale": draw(st.sampled_from((1.0, 0.25))), "window": window, "shift": shift}
    static |= {"residual": residual, "roll_first": draw(st.booleans())}
    return Call("window_rep_attention", [x, *parts, numbers(h, tokens, tokens), pad_kv], static)


@st.composite
def patch_calls(draw: Any, numbers: Numbers) -> Call:
    patch = [draw(st.integers(1, 6)), draw(st.integers(1, 6))]
    chans, height, width = draw(st.integers(1, 4)), draw(st.integers(6, 20)), draw(SIDES)
    last = draw(st.booleans())
    size = (height, width, chans) if last else (chans, height, width)
    n, depth = draw(SIZES), chans * patch[0] * patch[1]
    bias = numbers(n, scale=0.3) if draw(PRESENT) else None
    tensors = [numbers(draw(st.sampled_from((2, 1, 3, 0, 1, 2, 3))), *size), numbers.matrix(n, depth), bias]
    return Call("patch_projection", tensors, {"patch": patch, "channels_last": last})


KINDS = {
    "partial_gelu_ffn": ffn_calls,
    "gated_ffn": gated_calls,
    "rep_attention": attention_calls,
    "window_rep_attention": window_calls,
    "patch_projection": patch_calls,
}


QUANTIZED = ("partial_gelu_ffn", "gated_ffn", "rep_attention", "window_rep_attention")


@st.composite
def calls(draw: Any, name: str, dtypes: tuple[torch.dtype, ...] = DTYPES, quantize: str = "none") -> Call:
    """A call that must succeed, its tensors in layouts of all kinds, with packed weights or without."""
    dtype = draw(st.sampled_from(dtypes))
    call: Call = draw(KINDS[name](Numbers(draw(st.integers(0, 2**32)), dtype)))
    call.static["norm_eps"] = draw(st.sampled_from((None, 1e-6, 1e-5)))
    if name != "patch_projection":
        call.static["norm"] = draw(st.sampled_from(("layer", "rms")))
    if name in QUANTIZED:
        call.static["quantize"] = quantize
    if dtype != torch.float64 and draw(st.booleans()):
        call.packed = call.pack()
    call.tensors = [None if t is None else draw(laid_out(t)) for t in call.tensors]
    return call


@st.composite
def broken_calls(draw: Any, name: str) -> Call:
    """A call of which one to three arguments became something else; it may still be right."""
    call: Call = draw(calls(name))
    if call.packed is None and call.tensors[0].dtype != torch.float64 and draw(st.booleans()):
        call.packed = call.pack()
    whole = [*range(len(call.tensors)), "packed"]  # each is replaced once: PyTorch itself may not copy what came of it
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("tensor", "tensor", "static", "static", "packed")))
        if kind == "static":
            call.static[draw(st.sampled_from(sorted(call.static)))] = draw(STRANGE)
        elif kind == "tensor":
            index = draw(st.integers(0, len(call.tensors) - 1))
            if index in whole:
                whole.remove(index)
                call.tensors[index] = draw(another(call.tensors[index]))
        elif call.packed is not None and "packed" in whole:
            whole.remove("packed")
            call.packed = draw(another(call.packed))
    return call


@st.composite
def another(draw: Any, t: Any) -> Any:
    """What might stand in the place of a tensor by mistake."""
    kind = draw(
        st.sampled_from(("none", "shape", "dtype", "meta", "sparse", "conjugate", "no tensor", "freed", "huge"))
    )
    if kind == "none" or not _is_dense(t):
        return None if kind == "none" else torch.zeros(draw(st.lists(SMALL, max_size=4)))
    if kind == "shape":
        shape = list(t.shape)
        if shape and draw(st.booleans()):
            shape[draw(st.integers(0, len(shape) - 1))] = draw(SIZES)
        elif draw(st.booleans()):
            shape.insert(draw(st.integers(0, len(shape))), draw(SMALL))
        elif shape:
            shape.pop(draw(st.integers(0, len(shape) - 1)))
        return torch.zeros(shape, dtype=t.dtype)
    if kind == "dtype":
        others = (*DTYPES, torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
        return t.to(draw(st.sampled_from(others)))
    if kind == "sparse":
        return t.to_sparse()
    if kind == "conjugate":
        return torch.complex(t.float(), t.float()).conj()
    if kind == "freed":
        gone = t.contiguous().clone()
        gone.untyped_storage().resize_(0)
        return gone
    if kind == "huge":
        one = torch.zeros((1,) * max(t.dim(), 1), dtype=t.dtype)
        return one.expand([draw(st.sampled_from((0, 1, 2**20, 2**31, 2**40)))] * max(t.dim(), 1)) if t.dim() < 2 else t
    return t.to("meta") if kind == "meta" else draw(st.sampled_from((3, "x", [1.0], object())))


@st.composite
def steps(draw: Any) -> tuple[Tensor, list[Step]]:
    """A run of FFNs and attentions of one width for ``fused_blocks``."""
    dtype = draw(st.sampled_from(DTYPES))
    numbers = Numbers(draw(st.integers(0, 2**32)), dtype)
    c = draw(st.sampled_from((1, 7, 8, 16, 33, 48)))
    x = numbers(draw(st.integers(0, 4)), draw(st.sampled_from((0, 1, 5, 17))), c)
    made = []
    for _ in range(draw(st.integers(1, 4))):
        eps = draw(st.sampled_from((None, 1e-6)))
        if draw(st.booleans()):
            m = draw(SIZES)
            tensors = (numbers.matrix(m, c), None, numbers.matrix(c, m), None, numbers(c))
            static = {"norm_eps": eps, "residual": draw(st.booleans()), "approximate": "none"}
            packed = OP.partial_gelu_ffn_pack(tensors[0], tensors[2], None) if dtype != torch.float64 else None
            made.append(Step("partial_gelu_ffn", tensors, static, packed if draw(PRESENT) else None))
        else:
            h, d_qk, d_v = _heads(draw)
            tensors = tuple(_projections(draw, numbers, c, c, h, d_qk, d_v))
            static = {"num_heads": h, "scale": 0.5, "d_qk": d_qk, "norm_eps": eps, "residual": draw(st.booleans())}
            made.append(Step("rep_attention", tensors, static, None))
    return x, made
