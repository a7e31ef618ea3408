"""The operator fused_blocks and the module FusedStack: what the blocks give one by one, bit for bit, in one call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_helpers import images, in_threads, tiny_swin, tiny_vit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import repavit_ops
from repavit_ops import backends, ops, reference, stack_plan
from repavit_ops.nn import Block, PartialGELUFFN, RepAttention, WindowRepAttention
from repavit_ops.stack import FusedStack
from repavit_ops.stack_plan import Step

torch_ops = torch.ops.repavit_ops
needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def vit_blocks(dtype=torch.float32, dim=24, count=3):
    """Blocks that differ in every option, inference only."""
    torch.manual_seed(0)
    blocks = [
        Block(
            RepAttention(dim, 3, d_qk=5 + i, d_v=8, norm_eps=1e-5 if i else None, residual=True, bias=i != 1,
                         inner_norm_eps=1e-3 if i == 2 else None),
            PartialGELUFFN(dim, 7 * i, merged=i != 2, norm_eps=[None, 1e-6, 1e-5][i % 3], residual=i == 2,
                           approximate=("none", "tanh", "quick")[i]),
        )
        for i in range(count)
    ]  # fmt: skip
    return FusedStack(*blocks).to(dtype).requires_grad_(False)


def swin_blocks(dtype=torch.float32, dim=16):
    torch.manual_seed(1)
    blocks = []
    for shift in (0, 2):
        attention = WindowRepAttention(
            dim, 2, window=4, shift=shift, norm_eps=1e-5, residual=True, padding=True, roll_first=shift == 2
        )
        nn.init.normal_(attention.rel_bias)
        nn.init.normal_(attention.pad_kv)
        blocks.append(Block(attention, PartialGELUFFN(dim, 20)))
    return FusedStack(*blocks).to(dtype).requires_grad_(False)


def one_by_one(stack, x):
    for block in stack:
        x = block(x)
    return x


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 17])
def test_equals_the_blocks_one_by_one_bit_for_bit(dtype, batch, tokens):
    stack = vit_blocks(dtype)
    x = torch.randn(batch, tokens, 24).to(dtype)
    assert stack.why_apart(x) is None
    assert torch.equal(stack(x), one_by_one(stack, x))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (4, 4), (1, 13)], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_windowed_blocks_too(dtype, size, batch):
    stack = swin_blocks(dtype)
    x = torch.randn(batch, *size, 16).to(dtype)
    assert torch.equal(stack(x), one_by_one(stack, x))


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_neighbours_change_nothing(threads):
    stack, x = vit_blocks(), torch.randn(4, 9, 24)
    expected = stack(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(stack(x), expected)
        assert torch.equal(stack(x[2:3]), expected[2:3])
    finally:
        torch.set_num_threads(before)


@needs_cpp
def test_input_is_left_alone_and_may_have_any_strides():
    stack, x = vit_blocks(), torch.randn(2, 9, 24)
    kept, expected = x.clone(), stack(x)
    assert torch.equal(x, kept)
    strided = torch.full((2, 9, 48), torch.nan)[:, :, 10:34].copy_(x)
    assert torch.equal(stack(strided), expected)
    assert torch.equal(stack(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)


def test_plan_is_what_the_modules_say():
    for stack, size in ((vit_blocks(), ()), (swin_blocks(), (8, 8))):
        steps = [part.step(size) for block in stack for part in (block.attn, block.mlp)]
        for step, back in zip(steps, stack_plan.decode(*stack_plan.encode(steps)), strict=True):
            assert back.operator == step.operator
            assert back.static == step.static
            assert all(a is b for a, b in zip(back.tensors, step.tensors, strict=True))


def test_reference_and_float64():
    stack = vit_blocks(torch.float64)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    steps = [part.step() for block in stack for part in (block.attn, block.mlp)]
    expected = ops.fused_blocks(x, steps, backend="reference")
    torch.testing.assert_close(ops.fused_blocks(x, steps), expected, rtol=1e-11, atol=1e-11)


def test_no_route_is_looked_for_where_there_can_be_none(monkeypatch):
    stack = vit_blocks(torch.float64)
    monkeypatch.setattr(type(stack), "why_apart", lambda *_: pytest.fail("looked for a route in float64"))
    stack(torch.randn(2, 5, 24, dtype=torch.float64))


def test_gradient_of_the_operator_is_that_of_its_steps():
    stack = vit_blocks(torch.float64).requires_grad_(True)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    weights, plan, scalars = stack_plan.encode(part.step() for block in stack for part in (block.attn, block.mlp))
    (ours,) = torch.autograd.grad(torch_ops.fused_blocks(x, weights, plan=plan, scalars=scalars).square().sum(), x)
    (theirs,) = torch.autograd.grad(one_by_one(stack, x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


@needs_cpp
def test_tangents_are_those_of_the_steps():
    stack = vit_blocks(torch.float32)
    x, v = torch.randn(2, 2, 5, 24)
    steps = [part.step() for block in stack for part in (block.attn, block.mlp)]
    weights, plan, scalars = stack_plan.encode(steps)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(lambda x: reference.fused_blocks(x, weights, plan=plan, scalars=scalars), (x,), (v,))
        for call in (stack, lambda x: ops.fused_blocks(x, steps)):
            torch.testing.assert_close(torch.func.jvp(call, (x,), (v,)), expected)
    for block in stack:
        block.mlp.drop_unpacked()
    with pytest.raises(RuntimeError, match="keep_unpacked=False"):
        torch.func.jvp(stack, (x,), (v,))


@needs_cpp
def test_opcheck():
    x = torch.randn(2, 5, 24)
    weights, plan, scalars = stack_plan.encode(part.step() for b in vit_blocks() for part in (b.attn, b.mlp))
    torch.library.opcheck(torch_ops.fused_blocks.default, (x, weights), {"plan": plan, "scalars": scalars})


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
def test_fuse_stacks_the_blocks_and_keeps_the_keys(make):
    model, x = make(), images(2, 64 if make is tiny_swin else 32)
    fused = repavit_ops.fuse(model)
    stacks = [m for m in fused.modules() if isinstance(m, FusedStack)]
    assert len(stacks) == (2 if make is tiny_swin else 1)
    paths = {name.removesuffix(".attn") for name, _ in fused.named_modules() if name.endswith("attn")}
    assert paths == {name.removesuffix(".attn") for name, _ in model.named_modules() if name.endswith("attn")}
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    report = repavit_ops.fusion_report(fused)
    whole = 1  # the model itself
    assert len(report.with_status("stacked")) == (len(stacks) + whole if backends.why_unavailable("cpp") is None else 0)
    again = repavit_ops.fuse(fused)
    assert sum(isinstance(m, FusedStack) for m in again.modules()) == len(stacks)


@needs_cpp
class TestFallsApart:
    """What a stack does when one call would not be the same."""

    def test_hooks_are_called(self):
        stack, x, seen = vit_blocks(), torch.randn(1, 5, 24), []
        expected = stack(x)
        handle = stack[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        assert "hooks" in stack.why_apart(x)
        assert torch.equal(stack(x), expected)
        assert seen == [1]
        handle.remove()
        assert stack.why_apart(x) is None

    def test_global_hooks_are_called(self):
        stack, x, seen = vit_blocks(), torch.randn(1, 5, 24), []
        stack(x)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        stack(x)
        handle.remove()
        assert len(seen) > 3

    def test_gradients_flow(self):
        stack = vit_blocks().requires_grad_(True)
        x = torch.randn(1, 5, 24)
        assert "gradients" in stack.why_apart(x)
        stack(x).sum().backward()
        assert stack[0].mlp.w_merged.grad is not None

    def test_autocast_is_obeyed(self):
        stack, x = vit_blocks(), torch.randn(1, 5, 24)
        stack(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert stack(x).dtype == torch.bfloat16

    def test_blocks_that_are_not_fused_run_between(self):
        torch.manual_seed(0)
        first, second = vit_blocks(), vit_blocks()
        stack, x = FusedStack(*first, nn.LayerNorm(24), *second, nn.Identity()), torch.randn(2, 5, 24)
        with torch.no_grad():
            assert stack.why_apart(x) is None
            assert torch.equal(stack(x), one_by_one(stack, x))

    def test_other_backends(self):
        stack = vit_blocks()
        stack[0].attn.backend = "reference"
        assert "C++" in stack.why_apart()


@needs_cpp
def test_edits_are_seen_at_the_next_call():
    stack, x = vit_blocks(), torch.randn(1, 5, 24)
    before = stack(x)
    with torch.no_grad():
        stack[0].mlp.bias.add_(1)
    changed = stack(x)
    assert not torch.equal(changed, before)
    stack[1].attn.b_proj = nn.Parameter(torch.ones(24), requires_grad=False)
    assert torch.equal(stack(x), one_by_one(stack, x))
    stack[2] = copy.deepcopy(stack[0])
    assert torch.equal(stack(x), one_by_one(stack, x))
    stack[0].mlp.w_out.data.mul_(2)
    stack[0].mlp.repack()
    assert torch.equal(stack(x), one_by_one(stack, x))
    state = {key: torch.randn_like(value) for key, value in stack.state_dict().items()}
    stack.load_state_dict(state)
    assert torch.equal(stack(x), one_by_one(stack, x))
    half = stack.to(torch.bfloat16)
    assert torch.equal(half(x.bfloat16()), one_by_one(half, x.bfloat16()))


@needs_cpp
def test_copies_and_pickles():
    stack, x = vit_blocks(), torch.randn(1, 5, 24)
    expected = stack(x)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(other(x), expected)
        assert other.state_dict().keys() == stack.state_dict().keys()


@needs_cpp
def test_calls_from_several_threads():
    stack, inputs = vit_blocks(), [torch.randn(3, 7, 24) for _ in range(4)]
    expected, results = [one_by_one(stack, x) for x in inputs], in_threads(stack, inputs, times=20)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@needs_cpp
def test_compiles_in_one_graph_with_one_call():
    stack, x = vit_blocks(), torch.randn(2, 5, 24)
    expected = stack(x)
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(stack, fullgraph=True, backend=record)(x), expected)
    assert sum("fused_blocks" in str(node.target) for node in graphs[0].graph.nodes) == 1


@needs_cpp
def test_keep_unpacked_false_runs_from_the_packed_copy():
    model, x = tiny_vit(), images(2)
    expected = repavit_ops.fuse(model)
    lean = repavit_ops.fuse(model, keep_unpacked=False)
    with torch.no_grad():
        assert torch.equal(lean(x), expected(x))


@needs_cpp
def test_bad_plans_are_refused():
    x = torch.randn(1, 5, 24)
    weights, plan, scalars = stack_plan.encode(part.step() for b in vit_blocks() for part in (b.attn, b.mlp))
    with pytest.raises(RuntimeError, match="plan: got 65 integers"):
        torch_ops.fused_blocks(x, weights, plan=plan[:-1], scalars=scalars)
    for kind in (8, -1):
        with pytest.raises(RuntimeError, match=f"kind {kind}"):
            torch_ops.fused_blocks(x, weights, plan=[kind, *plan[1:]], scalars=scalars)
    with pytest.raises(RuntimeError, match=r"x: got shape \[1, 5, 23\]"):
        torch_ops.fused_blocks(x[..., 1:], weights, plan=plan, scalars=scalars)
    with pytest.raises(RuntimeError, match="no w_proj"):
        torch_ops.fused_blocks(x, [*weights[:2], None, *weights[3:]], plan=plan, scalars=scalars)
    with pytest.raises(ValueError, match="steps: got none"):
        ops.fused_blocks(x, [])
    with pytest.raises(ValueError, match="operator 'conv'"):
        ops.fused_blocks(x, [Step("conv", (), {})])
    narrow = RepAttention(24, 3, dim_out=8, norm_eps=1e-5).requires_grad_(False)
    with pytest.raises(RuntimeError, match="a stack needs them equal"):
        ops.fused_blocks(x, [narrow.step()])


def test_reference_of_the_operator_runs_its_steps():
    stack, x = vit_blocks(), torch.randn(2, 5, 24)
    weights, plan, scalars = stack_plan.encode(part.step() for b in stack for part in (b.attn, b.mlp))
    expected = reference.fused_blocks(x, weights, plan=plan, scalars=scalars)
    torch.testing.assert_close(one_by_one(stack, x), expected, rtol=1e-4, atol=1e-5)
