"""What only the C++ backend has: packed weights, instruction-set levels and the checks behind torch.ops."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from op_helpers import DTYPES, cast
from test_partial_gelu_ffn import operands

from repavit_ops import backends, nn
from repavit_ops.stack import FusedStack

OP = torch.ops.repavit_ops
REASON = backends.why_unavailable("cpp")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

PACKED_DIGEST = """
import hashlib, torch, repavit_ops.library
from repavit_ops.backends import cpu_isa
generator = torch.Generator().manual_seed(0)
w_in, w_out, w_merged = (torch.randn(*shape, generator=generator) for shape in ((37, 45), (45, 37), (45, 45)))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    packed = torch.ops.repavit_ops.partial_gelu_ffn_pack(w_in.to(dtype), w_out.to(dtype), w_merged.to(dtype))
    print(hashlib.sha256(packed.numpy().tobytes()).hexdigest(), end=" ")
print(cpu_isa())
"""


def run_at(level: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, in which the level is chosen anew."""
    environment = {**os.environ, "REPAVIT_CPU_ISA": level}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(45, 37), (64, 64), (33, 0), (0, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_unpack_is_the_inverse_of_pack(shape, dtype, merged):
    _, w_in, _, w_out, w_merged, _ = cast(operands(1, *shape), dtype)
    back = OP.partial_gelu_ffn_unpack(OP.partial_gelu_ffn_pack(w_in, w_out, w_merged if merged else None))
    expected = [w_in, w_out, w_merged if merged else torch.empty(0, 0, dtype=dtype)]
    for got, wanted in zip(back, expected, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_give_the_bits_that_plain_ones_give(dtype):
    x, w_in, b_in, w_out, w_merged, bias = cast(operands(29, 70, 45), dtype)
    packed = OP.partial_gelu_ffn_pack(w_in, w_out, w_merged)
    misaligned = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].copy_(packed)
    expected = OP.partial_gelu_ffn(x, w_in, b_in, w_out, w_merged, bias)
    for stored in (packed, misaligned):
        assert torch.equal(OP.partial_gelu_ffn(x, w_in, b_in, w_out, w_merged, bias, stored), expected)


def test_packed_weights_take_little_more_than_the_weights():
    for c in (192, 384, 768, 1024):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = torch.zeros(c, c, dtype=dtype)
            assert OP.partial_gelu_ffn_pack(w, w, w).numel() <= 1.1 * 3 * c * c * w.element_size()


def test_packed_weights_of_something_else_are_refused():
    x, w_in, b_in, w_out, w_merged, bias = cast(operands(5, 24, 12), torch.float32)
    good = OP.partial_gelu_ffn_pack(w_in, w_out, w_merged)
    others = {
        "no w_merged": OP.partial_gelu_ffn_pack(w_in, w_out, None),
        "m = 11": OP.partial_gelu_ffn_pack(w_in[1:], w_out[:, 1:], w_merged),
        "pack the weights again": OP.partial_gelu_ffn_pack(w_in.half(), w_out.half(), w_merged.half()),
        "not the result": torch.zeros_like(good),
        "partial_gelu_ffn_pack": good[:-1],
        "contiguous uint8": good.float(),
    }
    for message, packed in others.items():
        with pytest.raises(RuntimeError, match=f"packed: .*{message}"):
            OP.partial_gelu_ffn(x, w_in, b_in, w_out, w_merged, bias, packed)
    with pytest.raises(RuntimeError, match=r"packed: .*not the result"):
        OP.partial_gelu_ffn_unpack(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t[:, 1:]),
        ("b_in", lambda t: t[1:]),
        ("w_out", lambda t: t.t()),
        ("w_merged", lambda t: t[1:]),
        ("bias", lambda t: t.double()),
        ("w_in", lambda t: t.bfloat16()),
    ],
)
def test_the_operator_itself_names_what_disagrees(name, change):
    arguments = dict(zip(("x", "w_in", "b_in", "w_out", "w_merged", "bias"), operands(5, 24, 12), strict=True))
    arguments = {key: value.float() for key, value in arguments.items()}
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"{name}: got .*(wanted|but x is)"):
        OP.partial_gelu_ffn(**arguments)


def test_integers_and_unknown_activations_are_refused():
    x, *weights = (t.int() for t in operands(5, 24, 12))
    with pytest.raises(RuntimeError, match="x: got Int, wanted float32"):
        OP.partial_gelu_ffn(x, *weights)
    with pytest.raises(RuntimeError, match="approximate: got 'relu'"):
        OP.partial_gelu_ffn(*operands(5, 24, 12), approximate="relu")


def test_a_level_is_lowered_and_never_raised():
    highest = OP.cpu_isa()
    digests = set()
    for level, name in enumerate(backends.CPU_ISA):
        done = run_at(name, PACKED_DIGEST)
        assert done.returncode == 0, done.stderr
        *packed, chosen = done.stdout.split()
        assert backends.CPU_ISA.index(chosen) <= level
        if level <= highest:
            assert chosen == name
        digests.add(tuple(packed))
    assert len(digests) == 1, "the packed layout depends on the level"


def test_an_unknown_level_is_refused_at_the_first_use_and_not_at_import():
    assert run_at("sse9", "import repavit_ops.library").returncode == 0
    done = run_at("sse9", "import torch, repavit_ops.library; torch.ops.repavit_ops.cpu_isa()")
    assert done.returncode != 0
    assert "REPAVIT_CPU_ISA: got 'sse9', wanted one of scalar, avx2, avx512, avx512_bf16, amx" in done.stderr


@pytest.mark.parametrize("rows", [1, 5, 50, 97])
@pytest.mark.parametrize("kind", ["plain", "merged", "gated"])
def test_few_rows_of_large_weights_are_shared_by_columns_bit_for_bit(kind, rows):
    """From two threads on each has a part of the columns; what a row gets does not show it, in a stack neither."""
    if kind == "gated":
        ffn = nn.GatedFFN(300, 500, norm_eps=1e-6, residual=True)
    else:
        ffn = nn.PartialGELUFFN(300, 500, merged=kind == "merged", norm_eps=1e-6, residual=True)
    attention = nn.RepAttention(300, 6, norm_eps=1e-6, residual=True)
    ffn, attention = (m.eval().requires_grad_(False) for m in (ffn, attention))
    stack = FusedStack.replacing(torch.nn.Sequential(attention, ffn, attention, ffn))
    x = torch.randn(1, rows, 300, generator=torch.Generator().manual_seed(rows))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted, wanted_of_stack = ffn(x), stack(x)
        for threads in (2, 3, 4, 7):
            torch.set_num_threads(threads)
            assert torch.equal(ffn(x), wanted)
            assert torch.equal(stack(x), wanted_of_stack)
    finally:
        torch.set_num_threads(before)
