"""Packed buffers that somebody altered or cut: refused by name, and nothing beyond their end is read."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch
from case_helpers import (
    OP,
    REASON,
    case,
    every_operator,
    every_way,
    refused,
)
from op_helpers import cast
from test_partial_gelu_ffn import operands as ffn_operands

from repavit_ops import ops, stack_plan
from repavit_ops.stack_plan import Step

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FFN_FIELDS = {"dtype": (8, "i"), "merged": (12, "i"), "C": (16, "q"), "m": (24, "q"), "bytes": (32, "q")}
FIELDS = {  # byte offset and struct code of each field of a header (csrc/cpu/kernels.h)
    "partial_gelu_ffn": FFN_FIELDS,
    "gated_ffn": FFN_FIELDS,
    "rep_attention": {
        "dtype": (8, "i"),
        "heads": (12, "i"),
        "C": (16, "q"),
        "d_qk": (24, "q"),
        "d_v": (32, "q"),
        "C_out": (40, "q"),
        "bytes": (48, "q"),
    },
    "patch_projection": {"dtype": (8, "i"), "N": (16, "q"), "K": (24, "q"), "bytes": (32, "q")},
}
PACKED_OF = {"window_rep_attention": "rep_attention"}


def altered(packed, layout, **fields):
    """The buffer with other numbers in its header."""
    copy = packed.clone()
    for field, value in fields.items():
        offset, code = FIELDS[layout][field]
        copy[offset : offset + struct.calcsize(code)] = torch.frombuffer(
            bytearray(struct.pack(f"<{code}", value)), dtype=torch.uint8
        )
    return copy


def headers(layout):
    """Fields that no packed weights of ours have, one and two at a time."""
    numbers = [-(2**63), -1, 0, 64, 4096, 2**31 - 1, 2**40, 2**62, 2**63 - 1]
    sizes = [f for f, (_, code) in FIELDS[layout].items() if code == "q" and f != "bytes"]
    for field, (_, code) in FIELDS[layout].items():
        for value in numbers:
            if code == "q" or -(2**31) <= value < 2**31:
                yield {field: value}
    for a, b in itertools.combinations(sizes, 2):
        yield from ({a: value, b: value} for value in (4096, 2**31, 2**32, 2**62))


@every_way
@every_operator
def test_an_altered_header_is_refused(name, way):
    tensors, static = case(name)
    layout = PACKED_OF.get(name, name)
    for fields in headers(layout):
        bad = altered(tensors[-1], layout, **fields)
        if torch.equal(bad, tensors[-1]):
            continue
        refused("packed: ", way, name, [*tensors[:-1], bad], static)


@pytest.mark.parametrize("layout", FIELDS)
def test_unpack_believes_no_header(layout):
    """It raises, or what it returns is not more than the buffer holds."""
    (packed,) = case(layout)[0][-1:]
    unpack = getattr(OP, f"{layout}_unpack")
    for fields in headers(layout):
        bad = altered(packed, layout, **fields)
        try:
            weights = unpack(bad)
        except RuntimeError:
            refused("packed: ", unpack, bad)
            continue
        assert sum(w.numel() * w.element_size() for w in weights) <= packed.numel() - 64, fields


@pytest.mark.parametrize("layout", FIELDS)
def test_64_bytes_are_no_weights(layout):
    """A header alone that says how long it is, and how large the weights were that it does not hold."""
    (packed,) = case(layout)[0][-1:]
    sizes = {f: 4096 for f, (_, code) in FIELDS[layout].items() if code == "q" and f != "bytes"}
    refused("packed: ", getattr(OP, f"{layout}_unpack"), altered(packed[:64], layout, bytes=64, **sizes))
    refused("packed: ", getattr(OP, f"{layout}_unpack"), altered(packed[:64], layout, bytes=64))


@every_way
@every_operator
def test_a_truncated_buffer_is_refused(name, way):
    tensors, static = case(name)
    layout, packed = PACKED_OF.get(name, name), tensors[-1]
    for size in (0, 1, 63, 64, 65, packed.numel() // 2, packed.numel() - 4):
        bad = packed[:size]
        if size >= 64:
            bad = altered(bad, layout, bytes=size)
        refused("packed: ", way, name, [*tensors[:-1], bad], static)
        refused("packed: ", getattr(OP, f"{layout}_unpack"), bad)


def test_a_kept_plan_does_not_read_the_header_again():
    """A header that changes behind a kept plan moves no pointer: what it says now must not matter."""
    x, w_in, _, w_out, _, _ = cast(ffn_operands(3, 64, 5), torch.float32)
    packed = OP.partial_gelu_ffn_pack(w_in, w_out, None)
    static = {"norm_eps": None, "residual": False, "approximate": "none"}
    step = Step("partial_gelu_ffn", (w_in, None, w_out, None, None), static, packed)
    kept = OP.fused_blocks_keep(*stack_plan.encode([step]))
    expected = OP.fused_blocks_kept(x, kept)
    packed.copy_(altered(packed, "partial_gelu_ffn", merged=1))
    assert torch.equal(OP.fused_blocks_kept(x, kept), expected)
    OP.fused_blocks_drop(kept)


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("merged", [True, False])
def test_packed_weights_of_no_channels_or_none_hidden(channels, hidden, merged):
    """Of no channels w_merged has no element, and a copy of it is one of nothing."""
    x, w_in, w_out = torch.ones(4, channels), torch.ones(hidden, channels), torch.ones(channels, hidden)
    w_merged = torch.ones(channels, channels) if merged else None
    packed = OP.partial_gelu_ffn_pack(w_in, w_out, w_merged)
    y = ops.partial_gelu_ffn(x, w_in, None, w_out, w_merged, None, packed=packed, backend="cpp")
    torch.testing.assert_close(y, ops.partial_gelu_ffn(x, w_in, None, w_out, w_merged, None, backend="reference"))
