"""When a deployed module holds a packed copy of its weights, and which one."""

from __future__ import annotations

import pytest
import torch
from model_helpers import randomise
from torch.autograd import forward_ad

from repavit_ops import backends
from repavit_ops.nn import PartialGELUFFN, RepAttention

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


def ffn(**options):
    module = PartialGELUFFN(48, 40, **options)
    return randomise(module).requires_grad_(False)


def tokens(dtype=torch.float32):
    return torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("merged", [True, False])
@torch.no_grad()
def test_every_number_written_in_place_is_seen(merged):
    """PyTorch counts the edit, wherever in the weight it is: the fingerprint alone looks at some places."""
    module, x = ffn(merged=merged), tokens()
    module(x)
    for row in range(0, 40, 3):
        before = module.packed_copy
        module.w_in[row, 7] += 1.0
        wanted = PartialGELUFFN(48, 40, merged=merged, backend="reference")
        wanted.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x), wanted(x), rtol=1e-4, atol=1e-5)
        assert module.packed_copy is not before


@torch.no_grad()
def test_a_call_that_finds_nothing_new_keeps_the_copy():
    module, x = ffn(), tokens()
    module(x)
    before = module.packed_copy
    module(x)
    assert module.packed_copy is before is not None


@pytest.mark.parametrize("module", [ffn(), RepAttention(48, 3)], ids=["ffn", "attention"])
@torch.no_grad()
def test_no_copy_is_made_where_no_kernel_takes_one(module):
    module(tokens())
    assert module.packed_copy is not None
    module.backend = "reference"
    module(tokens())
    assert module.packed_copy is None
    module.backend = "auto"
    module.double()(tokens(torch.float64))
    assert module.packed_copy is None


@torch.no_grad()
def test_restoring_what_was_not_dropped_keeps_the_copy():
    module = ffn()
    module(tokens())
    before = module.packed_copy
    module.restore_unpacked()
    assert module.packed_copy is before is not None
    module.drop_unpacked()
    module.restore_unpacked()
    assert module.packed_copy is not None
    assert torch.equal(module(tokens()), ffn()(tokens()))


@torch.no_grad()
def test_dropping_where_there_is_no_copy_or_a_second_time_changes_nothing():
    module, x = ffn(backend="reference"), tokens()
    before = module(x)
    module.drop_unpacked()
    assert torch.equal(module.w_in, ffn().w_in)
    assert torch.equal(module(x), before)
    module = ffn()
    module.drop_unpacked()
    before, result = module.packed_copy, module(x)
    module.drop_unpacked()
    assert module.packed_copy is before
    assert torch.equal(module(x), result)


def test_derivatives_forward_and_transforms_alone_need_the_weights():
    module, x = ffn(), tokens()
    module.drop_unpacked()
    with torch.no_grad(), pytest.raises(RuntimeError, match="no weights to differentiate or transform"):
        torch.func.vmap(module)(x)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="no weights to differentiate or transform"):
            module(dual)
