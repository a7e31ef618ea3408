"""Operators on drawn arguments: the right result, or an error; ``make fuzz`` draws thousands at every CPU level."""

from __future__ import annotations

import pytest
import torch
from fuzz_cases import DTYPES, KINDS, QUANTIZED, Call, broken_calls, calls, fuzzing, require_message, steps
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repavit_ops import backends, ops, reference, stack_plan

REASON = backends.why_unavailable("cpp")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ERRORS = (ValueError, RuntimeError, TypeError, IndexError, OverflowError, NotImplementedError, AttributeError)
every_operator = pytest.mark.parametrize("name", KINDS)
THREADS = st.integers(1, 5)


@pytest.fixture(autouse=True)
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def widest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The tolerance of the library, and one rounding of the result; of float64, whose truth is eager itself, a few."""
    assert ours.shape == truth.shape
    roundings = 8 if ours.dtype == torch.float64 else 1
    bound = 2 * widest(eager.double() - truth) + roundings * torch.finfo(ours.dtype).eps * widest(truth) + 1e-6
    error = widest(ours.double() - truth)
    assert error <= bound, f"{error:.3g} off, bound {bound:.3g}"


def doubled(call: Call) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in call.tensors]


@every_operator
def test_any_shape_layout_dtype_and_option(name):
    @fuzzing
    @given(calls(name), THREADS)
    def check(call, threads):
        torch.set_num_threads(threads)
        truth, eager = call.truth(doubled(call)), call.truth()
        for ours in (call.run(), call.registered(), call.run("auto")):
            assert ours.dtype == call.tensors[0].dtype
            assert_as_good_as_eager(ours, eager, truth)
        assert torch.equal(call.run(), call.run())

    check()


@pytest.mark.parametrize("name", QUANTIZED)
def test_int8_of_any_shape_layout_dtype_and_option(name):
    """The formula in whole numbers, up to numbers that lie between two of them."""

    @fuzzing
    @given(calls(name, DTYPES[:3], "int8"), THREADS)
    def check(call, threads):
        torch.set_num_threads(threads)
        truth = call.truth()
        for ours in (call.run(), call.registered(), call.run("auto")):
            assert ours.dtype == truth.dtype
            assert ours.shape == truth.shape
            assert widest(ours.float() - truth.float()) <= 0.05 * (1 + widest(truth.float()))
        assert torch.equal(call.run(), call.run())

    check()


@every_operator
def test_any_subset_of_arguments_may_require_gradients(name):
    @fuzzing
    @given(calls(name, (torch.float64, torch.float32)), st.data())
    def check(call, data):
        tensors = [None if t is None else t.clone().requires_grad_(data.draw(st.booleans())) for t in call.tensors]
        call.packed = None
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        ours, eager = call.run("auto", tensors), call.truth(tensors)
        assert ours.requires_grad == bool(wanted)
        if not wanted or not eager.requires_grad:
            return
        weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(0)).to(ours.dtype)
        theirs = torch.autograd.grad((eager * weights).sum(), wanted, allow_unused=True, materialize_grads=True)
        for g, other in zip(torch.autograd.grad((ours * weights).sum(), wanted), theirs, strict=True):
            assert widest(g - other) <= 1e-4 * (1 + widest(other))

    check()


SPECIAL = st.sampled_from(
    (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 6e4, 1e-45, 5e-324, -0.0, 1e19, 1e-7)
)


@every_operator
def test_numbers_at_the_ends_stay_in_their_image(name):
    """One hostile number in one image: the others are as they were, bit for bit; NaN does not become a number."""

    @fuzzing
    @given(calls(name), SPECIAL, st.integers(0, 2**31), THREADS)
    def check(call, number, where, threads):
        torch.set_num_threads(threads)
        x = call.tensors[0]
        if x.dim() < 2 or not x.numel():
            return
        before = call.run()
        image = where % x.shape[0]
        x = x.clone(memory_format=torch.contiguous_format)
        x[image].view(-1)[where % x[image].numel()] = number
        call.tensors[0] = x
        after, eager = call.run(), call.truth()
        others = [i for i in range(x.shape[0]) if i != image]
        assert torch.equal(after[others], before[others])
        # two such numbers multiply beyond all floats, and in which order a score is summed decides whether it is one
        scored = "attention" in name and abs(number) > 1e18 and call.static["norm_eps"] is None
        if eager.isfinite().all() and not scored:
            assert_as_good_as_eager(after, eager, call.truth(doubled(call)))
        if number != number and name != "window_rep_attention":
            assert torch.equal(after.isnan(), eager.isnan())

    check()


@every_operator
def test_arguments_that_do_not_fit(name):
    @fuzzing
    @given(broken_calls(name), st.sampled_from(("run", "registered")), THREADS)
    def check(call, way, threads):
        torch.set_num_threads(threads)
        try:
            y = getattr(call, way)()
        except ERRORS as error:
            require_message(error)
            return
        assert isinstance(y, Tensor)
        try:
            expected = call.truth()
        except ERRORS:
            return
        assert y.shape == expected.shape
        assert y.dtype == expected.dtype
        assert y.device == expected.device

    check()


@fuzzing
@given(steps(), THREADS)
def test_runs_of_blocks_are_their_parts(drawn, threads):
    torch.set_num_threads(threads)
    x, made = drawn
    whole, apart = ops.fused_blocks(x, made, backend="cpp"), x
    for step in made:
        apart = ops.fused_blocks(apart, [step], backend="cpp")
    assert torch.equal(whole, apart)
    weights, plan, scalars = stack_plan.encode(made)
    eager = reference.fused_blocks(x, weights, plan=plan, scalars=scalars)
    double = [None if w is None else w.double() for w in weights]
    truth = reference.fused_blocks(x.double(), double, plan=plan, scalars=scalars)
    assert_as_good_as_eager(whole, eager, truth)


@fuzzing
@given(steps(), st.data())
def test_plans_of_any_integers(drawn, data):
    """A plan as the registered operator takes it: integers, weights and scalars changed at random."""
    x, made = drawn
    weights, plan, scalars = stack_plan.encode(made)
    weights, plan, scalars = list(weights), list(plan), list(scalars)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(("plan", "weights", "scalars", "shorter")))
        if kind == "plan":
            integers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2, 40))
            plan[data.draw(st.integers(0, len(plan) - 1))] = data.draw(integers)
        elif kind == "weights":
            other = st.sampled_from((None, torch.zeros(3), torch.zeros(2, 3, dtype=x.dtype), x))
            weights[data.draw(st.integers(0, len(weights) - 1))] = data.draw(other)
        elif kind == "scalars":
            scalars[data.draw(st.integers(0, len(scalars) - 1))] = data.draw(st.floats(width=32))
        else:
            del data.draw(st.sampled_from((plan, weights, scalars)))[-1]
            if not (plan and weights and scalars):
                return
    for call in (
        lambda: torch.ops.repavit_ops.fused_blocks(x, weights, plan=plan, scalars=scalars),
        lambda: torch.ops.repavit_ops.fused_blocks_keep(weights, plan, scalars),
    ):
        try:
            result = call()
        except ERRORS as error:
            require_message(error)
            continue
        if isinstance(result, int):
            torch.ops.repavit_ops.fused_blocks_drop(result)


@fuzzing
@given(st.sampled_from(DTYPES), st.integers(-(2**63), 2**63 - 1))
def test_kept_plans_of_any_number(dtype, number):
    """What no plan was kept under is refused; dropping it does nothing."""
    with pytest.raises(RuntimeError):
        torch.ops.repavit_ops.fused_blocks_kept(torch.zeros(1, 1, 8, dtype=dtype), number | 2**40)
    torch.ops.repavit_ops.fused_blocks_drop(number | 2**40)
