"""Arguments that no model would pass: each raises an error that names it, or gives the right result at once.

Integers of any size, tensors whose storage is gone, devices that are mixed.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from case_helpers import (
    D_QK,
    D_V,
    HEADS,
    NAMES,
    OP,
    REASON,
    case,
    every_operator,
    every_way,
    one_step,
    public,
    refused,
    registered,
)
from op_helpers import cast
from test_patch_projection import operands as patch_operands

from repavit_ops import ops, stack_plan
from repavit_ops.stack_plan import Step

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HUGE = (-(2**63), -(2**62), -(2**32), -1, 2**31, 2**32, 2**62, 2**63 - 1)
BEYOND = (2**63, 2**64, -(2**63) - 1)  # no int of a schema holds these


@every_way
@every_operator
def test_the_case_itself_is_accepted(name, way):
    tensors, static = case(name)
    assert way(name, tensors, static).numel() > 0


# ---- Integers --------------------------------------------------------------------------------------------------------


def wrapping(multiple, wanted):
    """Numbers whose product with ``multiple`` is, in 64 bits, that of ``wanted``."""
    step = 2**64 // multiple
    return [n for n in (wanted + step, wanted + step // 2, wanted - step, wanted + 2**62) if abs(n) < 2**63]


INTEGERS = {
    "rep_attention": {
        "num_heads": [*HUGE, 0, *wrapping(2 * D_QK + D_V, HEADS)],
        "d_qk": [*HUGE, 0, *wrapping(2 * HEADS, D_QK)],
    },
    "window_rep_attention": {
        "num_heads": [*HUGE, 0],
        "window": [[a, b] for a, b in itertools.product([*HUGE, 0, 4], repeat=2) if (a, b) != (4, 4)],
        "shift": [[a, b] for a, b in itertools.product([*HUGE, 4, 2], repeat=2) if (a, b) != (2, 2)],
    },
    "patch_projection": {
        "patch": [[a, b] for a, b in itertools.product([*HUGE, 0, 4, 2**62 + 4], repeat=2) if (a, b) != (4, 4)],
    },
}
ALSO_NAMED = {
    "num_heads": ("w_proj", "w_qkv", "head"),
    "d_qk": ("w_qkv",),
    "window": ("rel_bias",),
    "patch": ("weight",),
}


@every_way
@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, options in INTEGERS.items() for a in options])
def test_no_integer_gets_past_its_check(name, argument, way):
    tensors, static = case(name)
    for value in INTEGERS[name][argument]:
        given = {**static, argument: value}
        if argument == "shift":  # it must fit the window
            given["window"] = [4, 4]
        for packed in (tensors[-1], None):
            refused((argument, *ALSO_NAMED.get(argument, ())), way, name, [*tensors[:-1], packed], given)


@every_way
@pytest.mark.parametrize("window", [[2**32, 2**32], [2**62, 4], [2**33, 2**31], [2**32 + 1, 2**32 - 1]], ids=str)
def test_a_window_of_more_tokens_than_numbers(window, way):
    """In 64 bits the first three have no tokens, and that is what the bias is for."""
    tensors, static = case("window_rep_attention")
    for packed in (tensors[-1], None):
        given = [*tensors[:5], torch.empty(HEADS, 0, 0), tensors[6], packed]
        refused(("window", "rel_bias"), way, "window_rep_attention", given, {**static, "window": window})


@pytest.mark.parametrize("value", BEYOND, ids=str)
@pytest.mark.parametrize(("name", "argument"), [("rep_attention", "num_heads"), ("rep_attention", "d_qk")])
def test_numbers_beyond_64_bits(name, argument, value):
    tensors, static = case(name)
    refused((argument, *ALSO_NAMED[argument]), public, name, tensors, {**static, argument: value})


@pytest.mark.parametrize("value", BEYOND, ids=str)
def test_pairs_beyond_64_bits(value):
    tensors, static = case("window_rep_attention")
    refused("window", public, "window_rep_attention", tensors, {**static, "window": value})
    refused("shift", public, "window_rep_attention", tensors, {**static, "shift": (2, value)})
    tensors, static = case("patch_projection")
    refused("patch", public, "patch_projection", tensors, {**static, "patch": value})


@pytest.mark.parametrize("value", [2.5, (4,), (4, 4, 4), "4", None, (4, 4.0)], ids=str)
def test_what_is_no_pair_of_numbers(value):
    tensors, static = case("window_rep_attention")
    refused("window", public, "window_rep_attention", tensors, {**static, "window": value})
    refused("shift", public, "window_rep_attention", tensors, {**static, "shift": value})
    tensors, static = case("patch_projection")
    refused("patch", public, "patch_projection", tensors, {**static, "patch": value})


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("size", [(2, 5, 8), (2, 3, 2, 8), (0, 5, 8), (2, 0, 8)], ids=str)
def test_the_head_pools_tokens_that_are_there(size, backend, grad):
    x = torch.randn(size, requires_grad=grad)
    tokens = x.flatten(1, -2).shape[1]
    numbers = [*HUGE, 0, 1, tokens]
    for first, count in itertools.product(numbers, numbers):
        step = Step(
            "pooled_head", (torch.randn(3, 8), None, None, None), {"first": first, "count": count, "norm_eps": None}
        )

        if first >= 0 and count >= 0 and first + max(count, 1) <= tokens:
            assert ops.fused_blocks(x, [step], backend=backend).shape == (size[0], 3)
        else:
            refused("first, count", ops.fused_blocks, x, [step], backend=backend)


@pytest.mark.parametrize("value", HUGE)
def test_the_embedding_takes_whole_patches(value):
    x, weight, bias = cast(patch_operands(2, 3, 8, 12, (4, 4), 5, False), torch.float32)
    for patch in ([value, 4], [4, value], [value, value]):
        static = {"patch": patch, "as_map": False, "norm_eps": None}
        step = Step("token_embedding", (weight, bias, None, None, None, None), static)
        refused(("patch", "weight"), ops.fused_blocks, x, [step])


@pytest.mark.parametrize("iterations", [*HUGE[:4], 2**62, 2**63 - 1])
def test_the_peak_is_not_measured_for_years(iterations):
    refused("iterations", OP.product_peak, torch.empty(0), iterations)


@pytest.mark.parametrize("kept", [*HUGE, 0])
def test_a_plan_that_is_not_kept(kept):
    refused("kept", OP.fused_blocks_kept, torch.zeros(1, 2, 8), kept)
    OP.fused_blocks_drop(kept)


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_plan_of_the_wrong_length_or_kind(device, grad):
    tensors, _ = case("partial_gelu_ffn")
    x, *operands, packed = tensors
    step = Step(
        "partial_gelu_ffn", tuple(operands), {"norm_eps": None, "residual": False, "approximate": "none"}, packed
    )
    weights, plan, scalars = stack_plan.encode([step])
    weights = [t if t is None or device == "cpu" else t.to(device) for t in weights]
    x = x.to(device).requires_grad_(grad)

    def call(weights, plan, scalars):
        return OP.fused_blocks(x, weights, plan=plan, scalars=scalars)

    assert call(weights, plan, scalars).shape == x.shape
    for bad in ([], plan[:-1], [*plan, 0], plan * 2):
        refused("plan", call, weights, bad, scalars)
    refused("plan", call, weights[:-1], plan, scalars)
    refused("plan", call, weights, plan, scalars[:-1])
    refused("plan", call, [], [], [])
    for kind in (*HUGE, len(stack_plan.KINDS)):
        refused("plan", call, weights, [kind, *plan[1:]], scalars)
    for gelu in (*HUGE, -1, len(stack_plan.GELU_FORMS)):
        refused("plan", call, weights, [*plan[:2], gelu, *plan[3:]], scalars)


ATTENTION_CORES = {
    "num_heads": [*HUGE, 0, 3, HEADS + 2**61],
    "d_qk": [*HUGE, 0, *wrapping(2 * HEADS, D_QK)],
}


@pytest.mark.parametrize("argument", ATTENTION_CORES)
def test_attention_without_weights(argument):
    qkv = torch.randn(1, 4, HEADS * (2 * D_QK + D_V))
    for value in ATTENTION_CORES[argument]:
        static = {"num_heads": HEADS, "d_qk": D_QK, "scale": 1.0, argument: value}
        refused((argument, "qkv"), OP.attention_core, qkv, None, **static)
        refused(
            (argument, "qkv", "rel_bias"),
            OP.window_attention_core,
            qkv.unsqueeze(1),
            torch.zeros(HEADS, 4, 4),
            None,
            window=[2, 2],
            shift=[0, 0],
            **static,
        )


# ---- Sizes without elements ------------------------------------------------------------------------------------------

LONG = (2**40, 2**62, 2**63 - 1)


@pytest.mark.parametrize("long", LONG)
def test_weights_of_no_elements_are_packed_at_once(long):
    """Their panels have no elements either, however many there are."""
    for w_in, w_out in (((long, 0), (0, long)), ((0, long), (long, 0))):
        if long > 2**57:  # the offsets of those panels are beyond 64 bits
            refused("w_in, w_out", OP.partial_gelu_ffn_pack, torch.empty(w_in), torch.empty(w_out), None)
            continue
        packed = OP.partial_gelu_ffn_pack(torch.empty(w_in), torch.empty(w_out), None)
        assert packed.numel() == 64
        assert [tuple(t.shape) for t in OP.partial_gelu_ffn_unpack(packed)] == [w_in, w_out, (0, 0)]
    packed = OP.patch_projection_pack(torch.empty(long, 0))
    assert OP.patch_projection_unpack(packed)[0].shape == (long, 0)


@pytest.mark.parametrize("long", LONG)
def test_heads_of_no_channels(long):
    d_v, heads = 2, 1
    d_qk = (long - d_v) // 2
    w_qkv, w_proj = torch.empty(2 * d_qk + d_v, 0), torch.randn(3, d_v)
    static = {"num_heads": heads, "d_qk": d_qk}
    packed = OP.rep_attention_pack(w_qkv, w_proj, **static)
    assert OP.rep_attention_unpack(packed)[0].shape == w_qkv.shape
    x = torch.empty(1, 4, 0)
    for weights in (None, packed):
        tensors = (x, w_qkv, None, w_proj, None, *[None] * 5, weights)
        refused(("w_qkv", "memory"), OP.rep_attention, *tensors, scale=1.0, **static)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_memory_that_there_is_not_is_named_whoever_asked_for_it(threads):
    """Also on a thread of PyTorch's pool, from which an error reaches us without its words."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w_qkv, w_proj, x = torch.empty(2**40, 0), torch.randn(3, 2), torch.empty(1, 4, 0)
        static = {"num_heads": 1, "scale": 1.0, "d_qk": 2**39 - 1}
        refused("bytes of memory", OP.rep_attention, x, w_qkv, None, w_proj, None, **static)
    finally:
        torch.set_num_threads(before)


def test_results_without_elements_at_any_size():
    x = torch.empty(2**40, 0)
    y = OP.partial_gelu_ffn(x, torch.empty(2**40, 0), None, torch.empty(0, 2**40), None, None)
    assert y.shape == x.shape
    x = torch.empty(1, 2**40, 0)
    static = {"num_heads": 1, "scale": 1.0, "d_qk": 1}
    assert OP.rep_attention(x, torch.empty(3, 0), None, torch.empty(0, 1), None, **static).shape == x.shape


@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["", "norm"])
def test_what_is_left_of_no_channels_is_the_bias(norm_eps):
    """Nothing of the result stays as the allocator gave it."""
    bias = torch.randn(3)
    for tokens in (1, 7):
        x = torch.empty(2, tokens, 0)
        norm = (torch.empty(0), torch.empty(0)) if norm_eps else (None, None)
        static = {"first": 0, "count": 0, "norm_eps": norm_eps}
        y = ops.fused_blocks(x, [Step("pooled_head", (torch.empty(3, 0), bias, *norm), static)])
        assert torch.equal(y, bias.expand(2, 3))
        y = ops.rep_attention(
            x, torch.empty(3, 0), None, torch.randn(3, 1), bias, num_heads=1, d_qk=1, scale=1.0, norm_eps=norm_eps
        )
        assert torch.equal(y, bias.expand(2, tokens, 3))


def test_heads_of_no_values():
    x, bias = torch.randn(2, 5, 8), torch.randn(3)
    y = ops.rep_attention(x, torch.randn(2 * 2 * 3, 8), None, torch.empty(3, 0), bias, num_heads=2, d_qk=3, scale=1.0)
    assert torch.equal(y, bias.expand(2, 5, 3))


def test_a_map_of_no_pixels_has_no_patches():
    x = torch.empty(1, 0, 2**40, 2**20)
    refused(("memory", "size"), OP.patch_projection, x, torch.empty(5, 0), None, patch=[1, 1], channels_last=False)
    assert OP.patch_projection(x, torch.empty(0, 0), None, patch=[1, 1], channels_last=False).numel() == 0


# ---- Storages and devices --------------------------------------------------------------------------------------------


def each_tensor(name):
    tensors, static = case(name)
    for i, argument in enumerate(NAMES[name]):
        yield i, argument, list(tensors), static


@every_way
@every_operator
@pytest.mark.parametrize("bytes_left", [0, 4])
def test_a_freed_storage_is_refused_by_name(name, way, bytes_left):
    for i, argument, tensors, static in each_tensor(name):
        if way is one_step and argument == "attn_bias":
            continue
        tensors[i] = tensors[i].clone()
        tensors[i].untyped_storage().resize_(bytes_left)
        refused(f"{argument}: its storage", way, name, tensors, static)


@every_operator
def test_a_view_beyond_the_end_of_its_storage(name):
    for i, argument, tensors, static in each_tensor(name):
        t = tensors[i]
        if t.numel() == 0:
            continue
        memory = torch.zeros(2 * t.numel() + 8, dtype=t.dtype)
        tensors[i] = memory[8:].as_strided(t.shape, t.stride()).copy_(t)
        assert registered(name, tensors, static).numel() > 0
        memory.untyped_storage().resize_((7 + t.numel()) * t.element_size())  # one element too few
        refused(f"{argument}: its storage", registered, name, tensors, static)


@pytest.mark.parametrize("name", ["partial_gelu_ffn", "gated_ffn", "rep_attention", "patch_projection"])
def test_a_freed_weight_is_not_packed(name):
    pack = getattr(OP, f"{name}_pack")
    tensors, _ = case(name)
    names = {
        "partial_gelu_ffn": ("w_in", "w_out", "w_merged"),
        "gated_ffn": ("w_gate", "w_up", "w_out", "w_merged"),
        "rep_attention": ("w_qkv", "w_proj"),
        "patch_projection": ("weight",),
    }[name]
    static = {"num_heads": HEADS, "d_qk": D_QK} if name == "rep_attention" else {}
    weights = [tensors[NAMES[name].index(argument)] for argument in names]
    for i, argument in enumerate(names):
        given = [t.clone() for t in weights]
        given[i].untyped_storage().resize_(0)
        refused(f"{argument}: its storage", pack, *given, **static)


def test_a_kept_plan_sees_that_a_storage_was_freed():
    tensors, _ = case("partial_gelu_ffn")
    x, *operands, packed = tensors
    static = {"norm_eps": None, "residual": False, "approximate": "none"}
    for i, argument in enumerate(("x", "b_in", "bias", "packed")):
        mine = [t.clone() for t in (x, operands[1], operands[4], packed)]
        weights = (operands[0], mine[1], *operands[2:4], mine[2])
        kept = OP.fused_blocks_keep(*stack_plan.encode([Step("partial_gelu_ffn", weights, static, mine[3])]))
        expected = OP.fused_blocks_kept(mine[0], kept)
        assert torch.equal(expected, OP.partial_gelu_ffn(*tensors))
        mine[i].untyped_storage().resize_(0)
        refused(f"{argument}: its storage", OP.fused_blocks_kept, mine[0], kept)
        OP.fused_blocks_drop(kept)


@every_way
@every_operator
def test_devices_are_not_mixed(name, way):
    for i, argument, tensors, static in each_tensor(name):
        if way is one_step and argument == "attn_bias":
            continue
        tensors[i] = tensors[i].to("meta")
        refused((f"{argument}: ", "x is on meta", "weights["), way, name, tensors, static)
        everything_else = [t.to("meta") for t in tensors]
        everything_else[i] = case(name)[0][i]
        refused((f"{argument}: ", "x is on cpu", "weights["), way, name, everything_else, static)


@every_way
@every_operator
def test_all_on_the_meta_device_gives_the_shape(name, way):
    tensors, static = case(name)
    expected = way(name, tensors, static)
    y = way(name, [t.to("meta") for t in tensors], static)
    assert y.is_meta
    assert y.shape == expected.shape


@every_way
@every_operator
def test_sparse_tensors_are_refused_by_name(name, way):
    """PyTorch hands them to the formula, past the kernels' checks: patches of no pixels were a ZeroDivisionError."""
    for i, argument, tensors, static in each_tensor(name):
        if way is one_step and argument == "attn_bias":
            continue
        tensors[i] = tensors[i].to_sparse()
        refused((f"{argument}: got a tensor of layout", "weights["), way, name, tensors, static)


@pytest.mark.parametrize("zero", [[0, 2], [2, 0]], ids=str)
@pytest.mark.parametrize(("name", "argument"), [("patch_projection", "patch"), ("window_rep_attention", "window")])
def test_no_pixels_on_the_meta_device(name, argument, zero):
    tensors, static = case(name)
    refused(f"{argument}: got {zero}", registered, name, [t.to("meta") for t in tensors], {**static, argument: zero})


@pytest.mark.parametrize("argument", stack_plan.NAMED)
@every_operator
def test_names_of_no_form_on_the_meta_device(name, argument):
    """Where no kernel looks, the registered gated_ffn answered an activation '' with a KeyError."""
    tensors, static = case(name)
    if f" {argument}=" in str(getattr(OP, name).default._schema) or argument in static:
        refused(f"{argument}: got ''", registered, name, [t.to("meta") for t in tensors], {**static, argument: ""})


@pytest.mark.parametrize("norm_eps", [-1.0, float("nan"), -float("inf")])
@every_operator
def test_a_norm_has_a_variance_offset(name, norm_eps):
    tensors, static = case(name)
    refused("norm_eps", registered, name, tensors, {**static, "norm_eps": norm_eps})
    refused("norm_eps", public, name, tensors, {**static, "norm_eps": norm_eps})
