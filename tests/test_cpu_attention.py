"""What only the C++ backend has of attention: packed weights, the core without weights, threads, special scores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from op_helpers import DTYPES, assert_follows_rule, cast, randn
from test_rep_attention import operands
from test_window_rep_attention import SHAPES as WINDOW_SHAPES
from test_window_rep_attention import operands as window_operands

from repavit_ops import backends, nn, ops, reference

OP = torch.ops.repavit_ops
REASON = backends.why_unavailable("cpp")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HEADS = [(3, 64, 64), (2, 7, 5), (1, 80, 80), (2, 24, 72), (3, 1, 1)]  # heads, d_qk, d_v

PACKED_DIGEST = """
import hashlib, torch, repavit_ops.library
from repavit_ops.backends import cpu_isa
generator = torch.Generator().manual_seed(0)
w_qkv, w_proj = torch.randn(2 * (2 * 13 + 9), 45, generator=generator), torch.randn(37, 18, generator=generator)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    packed = torch.ops.repavit_ops.rep_attention_pack(w_qkv.to(dtype), w_proj.to(dtype), num_heads=2, d_qk=13)
    print(hashlib.sha256(packed.numpy().tobytes()).hexdigest(), end=" ")
print(cpu_isa())
"""


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "d_qk", "d_v"), HEADS)
def test_unpack_is_the_inverse_of_pack(heads, d_qk, d_v, dtype):
    (_, w_qkv, _, w_proj, _), _ = operands(1, 2, 45, heads, d_qk, d_v, c_out=33)
    w_qkv, w_proj = cast((w_qkv, w_proj), dtype)
    back = OP.rep_attention_unpack(OP.rep_attention_pack(w_qkv, w_proj, num_heads=heads, d_qk=d_qk))
    for got, wanted in zip(back, (w_qkv, w_proj), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_give_the_bits_that_plain_ones_give(dtype):
    tensors, static = operands(2, 29, 40, 2, 20, 12)
    x, w_qkv, b_qkv, w_proj, b_proj = cast(tensors, dtype)
    packed = OP.rep_attention_pack(w_qkv, w_proj, num_heads=2, d_qk=20)
    misaligned = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].copy_(packed)
    expected = OP.rep_attention(x, w_qkv, b_qkv, w_proj, b_proj, **static)
    for stored in (packed, misaligned):
        assert torch.equal(OP.rep_attention(x, w_qkv, b_qkv, w_proj, b_proj, *[None] * 5, stored, **static), expected)


def test_packed_weights_take_little_more_than_the_weights():
    (_, w_qkv, _, w_proj, _), _ = operands(1, 1, 192, 3, 64, 64)
    packed = OP.rep_attention_pack(w_qkv, w_proj, num_heads=3, d_qk=64)
    assert packed.numel() == 64 + 8 * (w_qkv.numel() + w_proj.numel())


def test_every_level_packs_the_same_bytes():
    digests = {}
    for level in backends.CPU_ISA:
        environment = {**os.environ, "REPAVIT_CPU_ISA": level}
        run = subprocess.run([sys.executable, "-c", PACKED_DIGEST], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        *digest, used = run.stdout.split()
        digests[used] = digest
    assert len({tuple(digest) for digest in digests.values()}) == 1


def test_packed_weights_of_something_else_are_refused():
    tensors, static = operands(2, 5, 16, 2, 8, 8)
    x, w_qkv, b_qkv, w_proj, b_proj = cast(tensors, torch.float32)
    other = OP.rep_attention_pack(w_qkv[:, :8], w_proj, num_heads=2, d_qk=8)
    with pytest.raises(RuntimeError, match="packed: holds C = 8"):
        OP.rep_attention(x, w_qkv, b_qkv, w_proj, b_proj, *[None] * 5, other, **static)
    with pytest.raises(RuntimeError, match="packed: this is not the result of rep_attention_pack"):
        OP.rep_attention(x, w_qkv, b_qkv, w_proj, b_proj, *[None] * 5, torch.zeros(99, dtype=torch.uint8), **static)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("heads", "d_qk", "d_v"), HEADS)
def test_core_matches_truth(heads, d_qk, d_v, biased, dtype):
    qkv = randn(3, 61, heads * (2 * d_qk + d_v)).to(dtype)
    bias = randn(3, heads, 61, 61, seed=1).to(dtype) if biased else None
    ours = OP.attention_core(qkv, bias, num_heads=heads, d_qk=d_qk, scale=d_qk**-0.5)
    eager = reference.attention_core(qkv, bias, heads, d_qk, d_qk**-0.5)
    truth = reference.attention_core(qkv.double(), bias.double() if biased else None, heads, d_qk, d_qk**-0.5)
    assert_follows_rule(ours, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["zeros", "padding"])
@pytest.mark.parametrize("name", ["swin_shifted", "padded", "rectangular"])
def test_window_core_matches_truth(name, padded, dtype):
    batch, height, width, _, heads, d, window, shift = WINDOW_SHAPES[name]
    qkv = randn(batch, height, width, 3 * heads * d)
    tokens = window[0] * window[1]
    rel_bias, row = randn(heads, tokens, tokens, seed=1), randn(3 * heads * d, seed=2) if padded else None
    qkv, rel_bias, row = cast((qkv, rel_bias, row), dtype)
    static = {"num_heads": heads, "d_qk": d, "scale": d**-0.5, "window": window, "shift": shift}
    for roll_first in (False, True):
        ours = OP.window_attention_core(qkv, rel_bias, row, roll_first=roll_first, **static)
        eager, truth = (
            reference.window_attention_core(*t, heads, d, d**-0.5, window, shift, roll_first)
            for t in ((qkv, rel_bias, row), cast((qkv, rel_bias, row), torch.float64))
        )
        assert_follows_rule(ours, eager.contiguous(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_bits_do_not_depend_on_the_threads(batch, dtype, threads):
    tensors, static = operands(batch, 97, 128, 2, 64, 64)
    tensors = cast(tensors, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ops.rep_attention(*tensors, norm_eps=1e-6, residual=True, **static))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_windows_do_not_depend_on_the_threads(dtype, threads):
    *five, rel_bias, pad_kv = cast(window_operands(1, 20, 13, 96, 3, 32, (7, 7), (3, 3))[0], dtype)
    static = window_operands(*WINDOW_SHAPES["swin_shifted"])[1]
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ops.window_rep_attention(*five, rel_bias=rel_bias, pad_kv=pad_kv, **static))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("tokens", [5, 40, 600], ids=["one_vector", "single_pass", "online"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_special_scores_reach_their_row_and_no_other(tokens, value):
    qkv, bias = randn(1, tokens, 48).float(), torch.zeros(tokens, tokens)
    bias[2, tokens - 1] = value
    ours = OP.attention_core(qkv, bias, num_heads=1, d_qk=16, scale=0.25)
    assert ours[0, 2].isnan().all()
    others = torch.arange(tokens) != 2
    expected = reference.attention_core(qkv, None, 1, 16, 0.25)
    torch.testing.assert_close(ours[0, others], expected[0, others])


@pytest.mark.parametrize("scale", [0.0, -0.5], ids=str)
def test_scale_need_not_be_positive(scale):
    qkv = randn(2, 37, 96).float() * 5
    ours = OP.attention_core(qkv, None, num_heads=2, d_qk=16, scale=scale)
    eager, truth = (reference.attention_core(t, None, 2, 16, scale) for t in (qkv, qkv.double()))
    assert_follows_rule(ours, eager, truth)


def test_rows_of_an_online_softmax_may_be_masked_block_by_block():
    qkv = randn(1, 700, 48).float()
    bias = torch.full((700, 700), float("-inf"))
    bias[:, 600:] = 0.0  # the first blocks of keys hold nothing
    bias[3] = float("-inf")
    ours = OP.attention_core(qkv, bias, num_heads=1, d_qk=16, scale=0.25)
    q, k, v = qkv.split(16, -1)
    expected = F.scaled_dot_product_attention(q, k[:, 600:], v[:, 600:], scale=0.25)
    expected[:, 3] = 0.0
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("tokens", [1, 5, 50, 97])
@pytest.mark.parametrize("heads", [6, 4])
def test_few_rows_of_large_weights_are_shared_by_heads_bit_for_bit(tokens, heads, threads):
    """From two threads on each has a part of the heads and of the columns; what a row gets does not show it."""
    block = nn.RepAttention(324, heads, d_qk=64, d_v=48, norm_eps=1e-6, residual=True).eval().requires_grad_(False)
    threads(1)
    xs = [randn(batch, tokens, 324).float() for batch in (1, 3)]
    wanted = [block(x) for x in xs]
    for count in (2, 3, 4, 7):
        threads(count)
        for x, y in zip(xs, wanted, strict=True):
            assert torch.equal(block(x), y)
