"""Modules and models as drawn: whatever is done to a fused module, a call computes what its state dict says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fuzz_cases import EXAMPLES, Numbers, fuzzing
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from model_helpers import randomise
from torch import nn

import repavit_ops
from repavit_ops import backends
from repavit_ops.models import SwinTransformer, VisionTransformer
from repavit_ops.nn import PartialGELUFFN, RepAttention, WindowRepAttention

REASON = backends.why_unavailable("cpp")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LOW = (torch.float32, torch.bfloat16, torch.float16)


def drawn_module(draw, seed):
    c, eps = draw(st.sampled_from((1, 6, 8, 16, 33))), draw(st.sampled_from((None, 1e-6)))
    common = {"norm_eps": eps, "residual": draw(st.booleans())}
    kind = draw(st.sampled_from(("ffn", "attention", "windows")))
    if kind == "ffn":
        module = PartialGELUFFN(c, draw(st.sampled_from((0, 1, 8, 31))), merged=draw(st.booleans()), **common)
        size = (2, 3, c)
    elif kind == "attention":
        module = RepAttention(c, 2, d_qk=draw(st.integers(1, 9)), d_v=draw(st.integers(1, 9)), **common)
        size = (2, 7, c)
    else:
        module = WindowRepAttention(c, 2, (2, 3), (1, 0), d_qk=4, d_v=3, padding=draw(st.booleans()), **common)
        size = (2, 5, 6, c)
    return randomise(module, seed), size


class PackedModule(RuleBasedStateMachine):
    """One module, edited in every way that users have; a call is compared with the formula on its state dict."""

    @initialize(data=st.data(), seed=st.integers(0, 1000))
    def make(self, data, seed):
        self.module, self.size = drawn_module(data.draw, seed)
        self.numbers = Numbers(seed, torch.float32)
        self.module.requires_grad_(False)

    @property
    def dropped(self):
        return any(type(p).__name__ == "DroppedWeight" for p in self.module.parameters())

    @rule()
    @torch.no_grad()
    def call(self):
        state = self.module.state_dict()  # its _metadata says which form w_merged has: kept
        for name, t in state.items():
            state[name] = t.double()
        dtype = next(self.module.parameters()).dtype
        x = self.numbers(*self.size).to(dtype)
        ours = self.module(x)
        formula = copy.deepcopy(self.module).double() if not self.dropped else self.unpacked().double()
        formula.load_state_dict(state)
        formula.backend = "reference"
        truth = formula(x.double())
        eager = formula.to(dtype)(x).double()
        largest = truth.abs().max().item() if truth.numel() else 0.0
        error = (ours.double() - truth).abs().max().item() if truth.numel() else 0.0
        theirs = (eager - truth).abs().max().item() if truth.numel() else 0.0
        assert error <= 2 * theirs + torch.finfo(dtype).eps * largest + 1e-6

    def unpacked(self):
        made = copy.deepcopy(self.module)
        made.restore_unpacked()
        return made

    @precondition(lambda self: not self.dropped)
    @rule(index=st.integers(0, 9), way=st.sampled_from(("in place", "data", "numpy", "new", "add")))
    @torch.no_grad()
    def edit(self, index, way):
        names = [name for name, _ in self.module.named_parameters()]
        name = names[index % len(names)]
        p = getattr(self.module, name)
        if way == "in place":
            p.mul_(-0.5)
        elif way == "data":
            p.data.mul_(-1.5).add_(0.01)
        elif way == "numpy" and p.dtype != torch.bfloat16:
            array = p.detach().numpy()
            array *= -1
        elif way == "new":
            setattr(self.module, name, nn.Parameter(-p.detach() + 0.02, requires_grad=False))
        else:
            p.add_(0.125)

    @rule(seed=st.integers(0, 100))
    @torch.no_grad()
    def load(self, seed):
        numbers = Numbers(seed, torch.float32)
        state = self.module.state_dict()
        for name, t in state.items():
            state[name] = numbers(*t.shape, scale=0.2).to(t.dtype)
        self.module.load_state_dict(state)

    @rule(dtype=st.sampled_from(LOW))
    def cast(self, dtype):
        self.module.to(dtype)

    @rule()
    def deepcopied(self):
        self.module = copy.deepcopy(self.module)

    @rule()
    def pickled(self):
        self.module = pickle.loads(pickle.dumps(self.module))

    @rule()
    def drop(self):
        self.module.drop_unpacked()

    @rule()
    def restore(self):
        self.module.restore_unpacked()

    @rule()
    def repack(self):
        self.module.repack()

    @rule(threads=st.integers(1, 4))
    def threads(self, threads):
        torch.set_num_threads(threads)

    def teardown(self):
        torch.set_num_threads(2)


PackedModule.TestCase.settings = settings(fuzzing, max_examples=max(EXAMPLES // 2, 5), stateful_step_count=12)
test_a_module_that_is_edited_in_any_order = PackedModule.TestCase


@st.composite
def models(draw):
    seed = draw(st.integers(0, 1000))
    options = {"num_classes": draw(st.sampled_from((0, 1, 5)))}
    if draw(st.booleans()):
        options["idle_ratio"] = draw(st.sampled_from((0.0, 0.3, 0.75, 1.0)))
    chosen = st.sampled_from(({}, {"layer_scale": 0.1}, {"skip_lam": 2.0}, {"qkv_bias": False}, {"head_bias": False}))
    if draw(st.booleans()):
        heads, width = draw(st.integers(1, 3)), draw(st.sampled_from((4, 6, 16)))
        patch = draw(st.integers(2, 6))
        sides = [patch * draw(st.integers(1, 4)) for _ in range(2)]
        model = VisionTransformer(
            img_size=tuple(sides),
            patch_size=patch,
            in_chans=draw(st.integers(1, 4)),
            embed_dim=heads * width,
            depth=draw(st.integers(0, 3)),
            num_heads=heads,
            mlp_ratio=draw(st.sampled_from((1.0, 2.5, 4.0))),
            pre_norm=draw(st.booleans()),
            global_pool=draw(st.sampled_from(("token", "avg"))),
            **options,
            **draw(chosen),
        )
        size = (model.patch_embed.proj.in_channels, *sides)
    else:
        sides = [4 * draw(st.integers(4, 13)) for _ in range(2)]
        model = SwinTransformer(
            img_size=tuple(sides),
            patch_size=4,
            embed_dim=8,
            depths=(2, draw(st.integers(1, 2))),
            num_heads=(1, 2),
            window_size=draw(st.integers(2, 5)),
            **options,
        )
        size = (3, *sides)
    return randomise(model, seed), Numbers(seed, torch.float32)(draw(st.integers(1, 4)), *size)


@settings(fuzzing, max_examples=max(EXAMPLES // 3, 5))
@given(models(), st.sampled_from(LOW), st.integers(1, 4), st.booleans())
def test_a_fused_model_of_any_shape_verifies(drawn, dtype, threads, keep_unpacked):
    model, x = drawn
    torch.set_num_threads(threads)
    try:
        fused = repavit_ops.fuse(model, dtype=dtype, keep_unpacked=keep_unpacked)
        report = repavit_ops.verify(model, fused, x)
        assert report, str(report)
        with torch.inference_mode():
            assert torch.equal(fused(x.to(dtype)), fused(x.to(dtype)))
    finally:
        torch.set_num_threads(2)


@fuzzing
@given(st.data())
def test_folds_are_exact_in_float64(data):
    """Training forms of any shape beside what they merge into."""
    draw = data.draw
    c, seed = draw(st.sampled_from((1, 4, 9, 16))), draw(st.integers(0, 1000))
    hidden = c * draw(st.integers(1, 4))
    options = {"residual": draw(st.booleans()), "layer_scale": draw(st.sampled_from((None, 0.3)))}
    options["skip_lam"] = draw(st.sampled_from((1.0, 2.0)))
    kind = draw(st.sampled_from(("idle", "attention")))
    if kind == "idle":
        module = repavit_ops.nn.ChannelIdleFFN(c, hidden, act_channels=draw(st.integers(0, hidden)), **options)
    else:
        heads = draw(st.sampled_from([h for h in (1, 2, 3, 4) if c % h == 0]))
        norm = draw(st.sampled_from((None, nn.LayerNorm, repavit_ops.nn.TokenBatchNorm, repavit_ops.nn.RepBN)))
        module = repavit_ops.nn.Attention(c, heads, norm=norm, **options)
    module = randomise(module.double(), seed)
    x = Numbers(seed, torch.float64)(2, draw(st.integers(1, 6)), c)
    with torch.no_grad():
        truth = module(x)
        for verb in (repavit_ops.reparameterize, repavit_ops.fuse):
            error = (verb(module)(x) - truth).abs().max().item()
            assert error <= 1e-9 * (1 + truth.abs().max().item())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_module_without_plain_weights_before_its_first_call(copied):
    module = randomise(PartialGELUFFN(8, 16)).requires_grad_(False)
    state, x = copy.deepcopy(module.state_dict()), torch.ones(2, 8)
    module.drop_unpacked()
    for name, value in copied(module).state_dict().items():
        assert torch.equal(value, state[name]), name
    with pytest.raises(RuntimeError, match="keep_unpacked=False"):
        copied(module)(x.clone().requires_grad_())
    assert torch.equal(copied(module)(x), module(x))
