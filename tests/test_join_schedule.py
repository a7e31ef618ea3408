"""α rises as its curve says, from any training loop, by itself, and across a resumed training."""

import copy
import itertools

import pytest
import torch
from model_helpers import images, randomise, relative
from torch import nn

from repavit_ops import JoinSchedule, load_checkpoint, reparameterize, save_checkpoint
from repavit_ops.models import JoinedVisionTransformer
from repavit_ops.nn import JoinedBranchFFN
from repavit_ops.nn.join import JoinedBranches
from repavit_ops.nn.join_schedule import JoinCurve

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "branches": 2}


def alpha_of(model):
    (alpha,) = {float(module.alpha) for module in model.modules() if isinstance(module, JoinedBranches)}
    return alpha


# --- the curve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.25), ("cosine", 0.1464466)])
def test_the_curve_is_zero_then_rises_then_holds_at_exactly_one(shape, quarter):
    curve = JoinCurve(1000, shape, warmup=0.1, hold=0.4)
    assert {curve(s) for s in range(101)} == {0.0}
    assert {curve(s) for s in range(600, 1100)} == {1.0}
    assert curve(225) == pytest.approx(quarter)
    assert curve(350) == pytest.approx(0.5)
    rise = [curve(s) for s in range(100, 601)]
    assert all(a < b for a, b in itertools.pairwise(rise))


@pytest.mark.parametrize("steps", [1, 3, 7, 313])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("hold", [0.0, 0.1, 1 / 3])
def test_every_curve_ends_at_exactly_one_and_stays_within_bounds(steps, shape, hold):
    curve = JoinCurve(steps, shape, warmup=0.2, hold=hold)
    assert curve(steps) == 1.0
    assert all(0.0 <= curve(s) <= 1.0 for s in range(steps + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0, wanted the steps of the whole training"),
        ({"shape": "step"}, "shape: got 'step', wanted one of linear, cosine"),
        ({"warmup": -0.1}, "warmup, hold: got -0.1 and 0.4"),
        ({"warmup": 0.6}, "warmup, hold: got 0.6 and 0.4, wanted shares"),
        ({"hold": float("nan")}, "warmup, hold: got 0.1 and nan"),
    ],
)
def test_bad_curves_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        JoinCurve(**{"steps": 10, **options})


# --- stepped from a loop ----------------------------------------------------------------------------------------------


def test_a_plain_loop_steps_it_beside_the_optimizer():
    model = nn.Sequential(JoinedBranchFFN(8, 16, 2), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = JoinSchedule(model, 10, warmup=0.2, hold=0.3)
    seen = []
    for _ in range(10):
        model(torch.ones(3, 8)).square().mean().backward()
        seen.append(model[0].join)
        optimizer.step()
        assert schedule.step() == model[0].join
    assert seen == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert seen[-1] == schedule.alpha == 1.0
    reparameterize(model.eval())


def test_a_new_schedule_takes_the_model_to_the_start():
    model = JoinedBranchFFN(8, 16, 2)
    model.join = 1.0
    JoinSchedule(model, 10)
    assert model.join == 0.0


def test_a_schedule_resumes_from_its_state_or_from_a_step():
    model = JoinedBranchFFN(8, 16, 2)
    schedule = JoinSchedule(model, 10)
    for _ in range(4):
        schedule.step()
    other = copy.deepcopy(model)
    resumed = JoinSchedule(other, 10)
    assert other.join == 0.0
    resumed.load_state_dict(schedule.state_dict())
    assert (resumed.count, other.join) == (4, model.join)
    assert resumed.step(7) == 1.0
    assert resumed.count == 7
    with pytest.raises(ValueError, match="at: got -1, wanted the number of optimizer steps"):
        resumed.step(-1)


def test_a_schedule_needs_joined_branches():
    with pytest.raises(ValueError, match="model: got Linear without joined branches"):
        JoinSchedule(nn.Linear(2, 2), 10)


# --- a model that raises α by itself ----------------------------------------------------------------------------------


def self_joining(**options):
    return JoinedVisionTransformer(**TINY, **{"join_steps": 10, "join_warmup": 0.0, "join_hold": 0.5, **options})


def test_every_training_forward_is_a_step_and_no_other_is():
    model, x = self_joining(join_shape="cosine"), images(1, 16)
    curve = JoinCurve(10, "cosine", 0.0, 0.5)
    for step in range(7):
        model.train()(x)
        assert alpha_of(model) == curve(step)
        model.eval()(x)
        assert alpha_of(model) == curve(step)
        assert int(model.join_step) == step + 1
    assert alpha_of(model) == 1.0


def test_a_resumed_training_goes_on_where_it_stopped():
    model, resumed, x = self_joining(), self_joining(), images(1, 16)
    for _ in range(3):
        model.train()(x)
    resumed.load_state_dict(model.state_dict())
    assert alpha_of(resumed) == alpha_of(model) == 0.4
    for each in (model, resumed, copy.deepcopy(model)):
        each.train()(x)
        assert alpha_of(each) == pytest.approx(0.6)


def test_state_dicts_with_and_without_the_counter_fit_both_models():
    counting, plain = randomise(self_joining()), randomise(JoinedVisionTransformer(**TINY), seed=1)
    counting.train()(images(1, 16))
    plain.load_state_dict(counting.state_dict())
    assert "join_step" not in plain.state_dict()
    counting.load_state_dict(plain.state_dict())
    assert int(counting.join_step) == 1
    state = counting.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*join_steps"):
        plain.load_state_dict({**state, "join_steps": state["join_step"]})


def test_a_manual_coefficient_stands_outside_training():
    model = self_joining().eval()
    for module in (module for module in model.modules() if isinstance(module, JoinedBranches)):
        module.join = 1.0
    model(images(1, 16))
    assert alpha_of(model) == 1.0


@pytest.mark.parametrize("merged", [False, True])
def test_saving_keeps_the_curve_and_the_step(tmp_path, merged):
    model, x = randomise(self_joining()), images(2, 16)
    for _ in range(8):
        model.train()(x)
    saved = reparameterize(model.eval()) if merged else model
    save_checkpoint(saved, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert loaded.join_curve == model.join_curve
    assert int(loaded.join_step) == 8
    assert relative(loaded(x), model.eval()(x)) < 1e-5
    loaded.train()(x)  # merged blocks can be fine-tuned
    assert int(loaded.join_step) == 8 + (not merged)


def test_a_compiled_model_raises_alpha_too_without_compiling_every_step():
    model, x, graphs = self_joining(join_steps=40), images(1, 16), []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    for _ in range(4):
        compiled(x)
    assert alpha_of(model) == pytest.approx(3 / 20)
    count = len(graphs)
    for _ in range(6):
        compiled(x)
    assert alpha_of(model) == pytest.approx(9 / 20)
    assert len(graphs) == count
    assert relative(compiled.eval()(x), model.eval()(x)) < 1e-6
