"""Plans that the C++ library keeps for many calls: always what fused_blocks gives, and gone when Python lets go."""

from __future__ import annotations

import gc

import pytest
import torch
from model_helpers import Recorder, images, in_threads, tiny_swin, tiny_vit

import repavit_ops
from repavit_ops import backends, stack_plan
from repavit_ops.stack.kept_plan import KeptPlan
from repavit_ops.stack.route import Route, keep

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
torch_ops = torch.ops.repavit_ops


def vit_plan():
    """Two fused ViT blocks, C = 48, as a plan, and the model that owns the weights."""
    model = repavit_ops.fuse(tiny_vit()).requires_grad_(False)
    with torch.no_grad():
        model(images(1))  # packs
    return stack_plan.encode(half.step((17,)) for block in model.blocks for half in (block.attn, block.mlp)), model


def swin_plan():
    """A whole Swin with two runs of windowed blocks and a merging between them."""
    model = repavit_ops.fuse(tiny_swin()).requires_grad_(False)
    return stack_plan.encode(model.steps(images(1, 64))), model


def plainly(plan, x):
    weights, integers, scalars = plan
    return torch_ops.fused_blocks(x, weights, plan=integers, scalars=scalars)


def test_any_batch_and_size_gives_the_same_bits():
    plan, _ = vit_plan()
    kept = KeptPlan(plan)
    for shape in ((1, 17, 48), (3, 17, 48), (2, 5, 48), (0, 17, 48), (1, 17, 48)):
        x = torch.randn(shape)
        for strided in (x, torch.randn(*shape[:2], 96)[..., :48]):
            assert torch.equal(kept(strided), plainly(plan, strided))
    plan, _ = swin_plan()
    kept = KeptPlan(plan)
    for batch in (1, 3, 2):
        assert torch.equal(kept(images(batch, 64)), plainly(plan, images(batch, 64)))


@pytest.mark.parametrize("name", ["b_in", "bias", "b_qkv", "b_proj"])
@pytest.mark.parametrize("how", ["in place", "new memory", "not in order"])
def test_edits_are_seen_at_the_next_call(name, how):
    plan, model = vit_plan()
    x = images(2).flatten(2)[..., :17].repeat(1, 16, 1).transpose(1, 2).contiguous()
    kept = KeptPlan(plan)
    before = kept(x)
    for parameter_name, parameter in model.blocks.named_parameters():
        if not parameter_name.endswith("." + name):
            continue
        if how == "in place":
            parameter.add_(1)
        elif how == "new memory":
            parameter.data = parameter.data + 1
        else:
            parameter.data = torch.stack((parameter.data, parameter.data), dim=1)[:, 0]
            kept(x)
            parameter.add_(1)
    assert not torch.equal(kept(x), before)
    assert torch.equal(kept(x), plainly(plan, x))


def test_another_dtype_is_refused_as_ever():
    plan, _ = vit_plan()
    kept, x = KeptPlan(plan), torch.zeros(1, 17, 48)
    kept(x)
    with pytest.raises(RuntimeError, match="w_qkv: got Float, but x is BFloat16"):
        kept(x.bfloat16())
    with pytest.raises(RuntimeError, match=r"x: got shape \[1, 17, 40\]"):
        kept(x[..., :40])
    assert torch.equal(kept(x), plainly(plan, x))


def test_calls_from_several_threads_on_several_sizes():
    plan, _ = vit_plan()
    kept = KeptPlan(plan)
    inputs = [torch.randn(1 + i % 2, 3 + 7 * i, 48) for i in range(4)]
    expected = [plainly(plan, x) for x in inputs]
    for ours, theirs in zip(in_threads(kept, inputs, times=20), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_is_let_go_of_with_its_object():
    plan, _ = vit_plan()
    kept, x = KeptPlan(plan), torch.zeros(1, 17, 48)
    kept(x)
    number = kept._number
    torch_ops.fused_blocks_kept(x, number)
    del kept
    gc.collect()
    with pytest.raises(RuntimeError, match=f"kept: got {number}, which is no plan that is kept"):
        torch_ops.fused_blocks_kept(x, number)
    torch_ops.fused_blocks_drop(number)  # once more is no error


def test_weights_outlive_the_model():
    plan, model = vit_plan()
    kept, x = KeptPlan(plan), torch.ones(1, 17, 48)
    expected = plainly(plan, x)
    kept(x)
    del plan, model
    kept._plan = None
    gc.collect()
    assert torch.equal(kept(x), expected)


@torch.no_grad()
def test_a_model_keeps_one_plan_per_kind_of_input_and_none_after_it():
    fused, x = repavit_ops.fuse(tiny_vit()), images(1)

    def numbers(model):
        return [call._number for route in model._routes.values() for call in route.calls]

    fused(x)
    first = numbers(fused)
    fused(x), fused(images(3))
    assert numbers(fused) == first
    fused.blocks[0].mlp.w_in.mul_(2)
    fused(x)
    last = numbers(fused)
    assert len(last) == 1
    assert last != first
    del fused
    gc.collect()
    for number in first + last:
        with pytest.raises(RuntimeError, match="no plan that is kept"):
            torch_ops.fused_blocks_kept(x, number)


@torch.no_grad()
def test_a_position_table_resized_for_other_images_is_kept_until_somebody_writes():
    """``.data`` raises no version counter, and the plan holds a table of its own."""
    model = tiny_vit()
    fused, x = repavit_ops.fuse(model), images(1, 48)
    fused(x)
    (first,) = fused._routes.values()
    fused(x)
    assert next(iter(fused._routes.values())) is first
    for one in (model, fused):
        one.pos_embed.data.add_(0.5)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    assert next(iter(fused._routes.values())) is not first


def test_sixteen_routes_are_kept_and_the_next_one_starts_anew():
    routes, route = {}, Route(())
    for size in range(16):
        keep(routes, (size,), route)
    assert list(routes) == [(size,) for size in range(16)]
    keep(routes, (0,), other := Route(()))  # one that is known takes its own place
    assert len(routes) == 16
    assert routes[(0,)] is other
    keep(routes, (16,), route)
    assert list(routes) == [(16,)]


def test_whoever_records_operators_sees_the_weights():
    plan, _ = vit_plan()
    kept, x = KeptPlan(plan), torch.zeros(1, 17, 48)
    for _ in range(2):  # before it is kept, and after
        with Recorder() as recorder:
            kept(x)
        assert recorder.calls == ["repavit_ops::fused_blocks"]
        kept(x)
    with Recorder() as recorder:
        del kept
        gc.collect()
    assert recorder.calls == []


def test_a_bad_plan_is_refused():
    (weights, integers, scalars), _ = vit_plan()
    with pytest.raises(RuntimeError, match="plan: got"):
        KeptPlan((weights, integers[:-1], scalars))(torch.zeros(1, 17, 48))


def test_weights_made_in_inference_mode_have_no_counters_to_keep():
    with torch.inference_mode():
        model, x = tiny_vit(), images()
        with pytest.warns(UserWarning, match="inference_mode"):
            fused = repavit_ops.fuse(model)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(fused(x), fused(x))
