"""α is set by one function, travels wherever the module goes, and is never rounded."""

import copy
import io
import pickle

import pytest
import torch
from joined_helpers import (
    HEADS,
    HIDDEN,
    C,
    N,
    T,
    make_attention,
    make_ffn,
    tokens,
)
from torch import nn

from repavit_ops.nn import JoinedBranchAttention, JoinedBranchFFN, set_join

pytestmark = pytest.mark.usefixtures("float64_default")


def nested():
    ffn, _ = make_ffn("idle")
    attention, _ = make_attention("b_default")
    return nn.ModuleDict({"block": nn.Sequential(attention, ffn), "head": nn.Linear(C, 5), "last": make_ffn("sum")[0]})


def test_new_modules_start_apart():
    for m in (JoinedBranchFFN(C, HIDDEN, 2), JoinedBranchAttention(C, HEADS, 2)):
        assert (m.join, float(m.alpha)) == (0.0, 0.0)


def test_set_join_sets_every_joined_module():
    model = nested()
    assert set_join(model, 0.3) == 3
    assert [float(v) for k, v in model.state_dict().items() if k.endswith("alpha")] == [0.3] * 3
    assert [m.join for m in (*model["block"], model["last"])] == [0.3] * 3
    assert set_join(model["last"], torch.tensor(1.0)) == 1
    assert [m.join for m in (*model["block"], model["last"])] == [0.3, 0.3, 1.0]


@pytest.mark.parametrize("alpha", [-0.1, 1.0001, float("nan"), float("inf")])
def test_set_join_refuses_what_is_no_coefficient(alpha):
    model = nested()
    with pytest.raises(ValueError, match=r"alpha: got .*, wanted the join coefficient, in \[0, 1\]"):
        set_join(model, alpha)
    assert model["last"].join == 0


def test_set_join_refuses_a_model_without_joined_branches():
    with pytest.raises(ValueError, match="model: got Sequential without joined branches"):
        set_join(nn.Sequential(nn.Linear(2, 2)), 0.5)
    m, _ = make_ffn("default")
    set_join(m, 1.0)
    with pytest.raises(ValueError, match="model: got PartialGELUFFN"):
        set_join(m.fuse(), 1.0)


def same(a, b, x):
    return all(torch.equal(u(x), v(x)) for u, v in ((a["block"], b["block"]), (a["last"], b["last"])))


@pytest.mark.parametrize("assign", [False, True])
def test_alpha_travels_in_the_state_dict(assign):
    model, other, x = nested(), nested(), tokens()
    set_join(model, 0.3)
    assert not same(model, other, x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert other["last"]._alpha == 0.3  # at loading, not at the next eager call: compiled calls cannot look
    assert same(model, other, x)
    with pytest.raises(RuntimeError, match=r"alpha is 0\.3"):
        other["last"].fuse()


def test_alpha_travels_in_copies():
    model, x = nested(), tokens()
    set_join(model, 0.3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(model, other, x)
        set_join(other, 1.0)
        assert model["last"].join == 0.3
        assert not same(model, other, x)


def test_alpha_is_not_rounded_by_casts():
    m, _ = make_ffn("default")
    set_join(m, 0.999)
    assert (m.bfloat16().join, m.alpha.dtype, float(m.alpha)) == (0.999, torch.float64, 0.999)
    assert (m.half().join, m.float().join, m.fc1_weight.dtype) == (0.999, 0.999, torch.float32)
    x = torch.randn(2, C, dtype=torch.float32)
    assert m(x).dtype == torch.float32


def test_alpha_survives_the_meta_device():
    with torch.device("meta"):
        m = JoinedBranchFFN(C, HIDDEN, 2)
    set_join(m, 0.3)
    for unread in (m, copy.deepcopy(m)):  # a copy has yet to read its buffer, and meta holds no value
        assert unread(torch.empty(3, C, device="meta")).shape == (3, C)
        assert float(unread.to_empty(device="cpu").alpha) == 0.3
    with torch.device("meta"):
        m = JoinedBranchFFN(C, HIDDEN, 3)
    source, x = make_ffn("default")[0], tokens()
    set_join(source, 0.3)
    m.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(m.eval()(x), source(x))


def test_a_write_to_the_buffer_is_noticed():
    """As a moving average of parameters and buffers writes it."""
    model, x = nested(), tokens()
    average = copy.deepcopy(model)
    set_join(model, 0.3)
    with torch.no_grad():
        for a, b in zip(average.buffers(), model.buffers(), strict=True):
            a.copy_(b)
    assert same(average, model, x)
    model["last"].alpha.fill_(0.5)
    with pytest.raises(RuntimeError, match=r"alpha is 0\.5"):
        model["last"].fuse()


def test_modules_made_in_inference_mode_work():
    with torch.inference_mode():
        m = JoinedBranchFFN(C, HIDDEN, 2)
        set_join(m, 0.3)
        assert m(tokens()).shape == (N, T, C)
        assert m.join == 0.3
