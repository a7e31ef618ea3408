"""fuse(keep_unpacked=False): every use of a weight that was freed is right, or refused by name with the fix."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from model_helpers import images, relative, tiny_swin, tiny_vit
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import repavit_ops
from repavit_ops import backends
from repavit_ops.nn.dropped_weight import DroppedWeight
from repavit_ops.nn.packed_weights import PackedWeights

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
BUILDERS = {"vit": (tiny_vit, 32), "swin": (tiny_swin, 64)}
models = pytest.mark.parametrize(("build", "size"), BUILDERS.values(), ids=BUILDERS)


def fused(build, seed=0):
    return repavit_ops.fuse(build(seed))


def lean(build, seed=0):
    return repavit_ops.fuse(build(seed), keep_unpacked=False)


def dropped_of(model):
    return [p for p in model.parameters() if isinstance(p, DroppedWeight)]


def copied_by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


REFUSED = {
    "clone": lambda p: p.clone(),
    "detach": lambda p: p.detach(),
    "data": lambda p: p.data,
    "data set": lambda p: setattr(p, "data", torch.zeros(p.shape)),
    "in place": lambda p: p.add_(1),
    "copy_": lambda p: p.copy_(torch.zeros(p.shape)),
    "copied from": lambda p: torch.zeros(p.shape).copy_(p),
    "arithmetic": lambda p: 2 * p,
    "item": lambda p: p[0, 0].item(),
    "tolist": lambda p: p.tolist(),
    "numpy": lambda p: p.numpy(),
    "asarray": lambda p: np.asarray(p),
    "DLPack": lambda p: torch.from_dlpack(p),
    "data_ptr": lambda p: p.data_ptr(),
    "to": lambda p: p.to(torch.float64),
    "equal": lambda p: torch.equal(p, p),
    "foreach": lambda p: torch._foreach_add_([p], 1.0),
    "lerp": lambda p: torch._foreach_lerp_([torch.zeros(p.shape)], [p], 0.5),
    "initialised": lambda p: nn.init.zeros_(p),
    "vector": lambda p: parameters_to_vector([p]),
    "from vector": lambda p: vector_to_parameters(torch.zeros(p.numel()), [p]),
    "linear": lambda p: torch.nn.functional.linear(torch.zeros(1, p.shape[1]), p),
    "storage": lambda p: p.untyped_storage().copy_(torch.zeros(p.shape).untyped_storage()),
}


@pytest.mark.parametrize("use", REFUSED)
def test_a_freed_weight_is_neither_read_nor_written(use):
    weight = lean(tiny_vit).blocks[0].mlp.w_in
    with pytest.raises(RuntimeError) as raised:
        REFUSED[use](weight)
    if use != "storage":  # there PyTorch itself compares sizes
        assert "w_in of PartialGELUFFN" in str(raised.value)
        assert "keep_unpacked=True" in str(raised.value)


def test_a_freed_weight_says_what_it_is():
    full, weight = fused(tiny_vit).blocks[0].mlp.w_in, lean(tiny_vit).blocks[0].mlp.w_in
    for name in ("shape", "dtype", "device", "ndim", "is_leaf", "nbytes", "layout"):
        assert getattr(weight, name) == getattr(full, name)
    assert (weight.numel(), weight.size(), len(weight)) == (full.numel(), full.size(), len(full))
    assert weight.untyped_storage().nbytes() <= 8
    assert repr(weight).startswith("DroppedWeight(w_in of PartialGELUFFN")


@torch.no_grad()
@models
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copied_by_torch_save],
    ids=["deep", "pickle", "save"],
)
def test_a_copy_is_as_lean_and_apart(build, size, copied):
    model, x = lean(build), images(height=size)
    expected = model(x)
    other = copied(model)
    assert torch.equal(other(x), expected)
    assert len(dropped_of(other)) == len(dropped_of(model)) > 0
    other.load_state_dict(fused(build, 3).state_dict())
    assert torch.equal(model(x), expected)
    assert torch.equal(other(x), fused(build, 3)(x))


@models
def test_state_dict_has_the_weights(build, size):
    full, model = fused(build), lean(build)
    for keep_vars in (False, True):
        state = model.state_dict(keep_vars=keep_vars)
        assert list(state) == list(full.state_dict())
        assert all(torch.equal(state[name], value) for name, value in full.state_dict().items())
    assert len(dropped_of(model)) > 0


def without(values, *endings):
    return {name: value for name, value in values.items() if not name.endswith(endings)}


@torch.no_grad()
@models
@pytest.mark.parametrize("form", ["eager", "aot_eager"])
@pytest.mark.parametrize("share", ["all", "some"])
def test_functional_call_takes_the_weights_that_it_is_given(build, size, form, share):
    torch._dynamo.reset()
    model, x, other = lean(build), images(height=size), fused(build, 3)
    run = model if form == "eager" else torch.compile(model, backend=form)
    expected = run(x)
    given = dict(other.named_parameters())
    if share == "some":
        if form != "eager":
            pytest.skip("compiled, of a freed weight's neighbours either all are given or none")
        given = without(given, "w_in", "w_qkv", "weight")
    plain = repavit_ops.fuse(fused(build), backend="reference")
    right = functional_call(plain, given, (x,))
    prefix = "" if form == "eager" else "_orig_mod."
    y = functional_call(run, {prefix + name: value for name, value in given.items()}, (x,))
    assert relative(y, right) < 1e-5
    assert relative(y, expected) > 1e-2
    assert torch.equal(run(x), expected)


@torch.no_grad()
@models
@pytest.mark.parametrize("form", ["eager", "aot_eager"])
def test_a_parameter_that_is_assigned_is_packed(build, size, form):
    torch._dynamo.reset()
    model, x, other = lean(build), images(height=size), fused(build, 3)
    run = model if form == "eager" else torch.compile(model, backend=form)
    run(x)
    plain = repavit_ops.fuse(fused(build), backend="reference")
    for name in [name for name, _ in other.named_parameters() if name.endswith(("w_in", "w_proj"))]:
        for each in (model, plain):
            owner, _, key = name.rpartition(".")
            setattr(each.get_submodule(owner), key, nn.Parameter(other.get_parameter(name).clone()))
    assert relative(run(x), plain(x)) < 1e-5
    with torch.no_grad():
        for each in (model, plain):  # and is followed from then on
            each.blocks[0].mlp.w_in.mul_(3) if build is tiny_vit else each.layers[0].blocks[0].mlp.w_in.mul_(3)
    assert relative(run(x), plain(x)) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_averages_are_refused_and_gradients_too():
    model = lean(tiny_vit)
    average = AveragedModel(model)
    with pytest.raises(RuntimeError, match="keep_unpacked=True"):
        average.update_parameters(model)
    with pytest.raises(RuntimeError, match="keep_unpacked=True"):
        model(images().requires_grad_())


@torch.no_grad()
@models
def test_it_can_be_compiled_and_moved_but_not_exported(build, size):
    torch._dynamo.reset()
    model, x = lean(build), images(height=size)
    expected = model(x)
    assert relative(torch.compile(copy.deepcopy(model), backend="aot_eager")(x), expected) < 1e-5
    with pytest.raises(RuntimeError, match="keep_unpacked=True"):
        torch.export.export(model, (x,))
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(moved(x.bfloat16()), fused(build).to(torch.bfloat16)(x.bfloat16()))
    model.share_memory()
    assert torch.equal(model(x), expected)
    assert len(dropped_of(moved)) == len(dropped_of(model)) > 0


def test_pickles_of_the_first_version_are_read():
    """There the places of freed weights held zeros, and the module said so."""
    module = repavit_ops.nn.PartialGELUFFN(16, 24, norm_eps=1e-6).requires_grad_(False)
    packed = torch.ops.repavit_ops.partial_gelu_ffn_pack(*module.sources())
    x = torch.randn(5, 16)
    expected = module(x)
    state = {name: value for name, value in module.__dict__.items() if name != "_copy"}
    state |= {
        "_packed": packed,
        "_packed_stamp": None,
        "_unpacked_dropped": True,
        "_parameters": dict(module._parameters),
    }
    for name in module.packed_names:
        state["_parameters"][name] = nn.Parameter(torch.zeros(()).expand(getattr(module, name).shape), False)
    older: PackedWeights = repavit_ops.nn.PartialGELUFFN.__new__(repavit_ops.nn.PartialGELUFFN)
    older.__setstate__(state)
    assert torch.equal(older(x), expected)
    assert torch.equal(older.state_dict()["w_in"], module.w_in)
