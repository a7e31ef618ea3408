"""cuda_graph without a GPU: a stand-in for torch.cuda records a capture and runs it again at replay."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import repavit_ops
from repavit_ops import cuda_graphs


class Tape(TorchDispatchMode):
    """A graph: every operation of the capture on its very tensors, done again by ``replay``."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            if isinstance(again, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)


class Stream:
    def wait_event(self, event):
        event.waited += 1

    def wait_stream(self, stream):
        pass


class Event:
    waited = recorded = 0

    def record(self):
        self.recorded += 1


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as far as cuda_graph uses it, on CPU tensors; counts captures."""
    captures = []

    @contextlib.contextmanager
    def graph(tape, pool, stream):
        assert pool == "pool"
        assert isinstance(stream, Stream)  # one of the tensors' own device
        captures.append(tape)
        with tape:
            yield

    stand_ins = {
        "is_available": lambda: True,
        "CUDAGraph": Tape,
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": graph,
        "graph_pool_handle": lambda: "pool",
    }
    monkeypatch.setattr(cuda_graphs, "GPU", "cpu")
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return captures


class Nested(nn.Module):
    """Takes and gives nested arguments; ``calls`` counts how often Python came by."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x, *, others=(), flip=False):
        self.calls += 1
        y = self.linear(x)
        for other in others:
            y = y + other
        return {"y": -y if flip else y, "pair": (x, "text", None), "shape": y.shape[0]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Nested().eval()


def eager(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


@torch.no_grad()
def test_captured_once_per_kind_of_input(gpu, model):
    graphed = repavit_ops.cuda_graph(model)
    for rows in (2, 3, 2, 3, 2):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(graphed(x)["y"], eager(model, x)["y"])
    assert len(gpu) == 2
    before = model.calls
    graphed(torch.randn(2, 4))
    assert model.calls == before  # Python does not come by any more
    model.double()
    graphed.reset()
    graphed(torch.randn(2, 4).double())
    assert len(gpu) == 3


@torch.no_grad()
def test_nested_arguments_and_results(gpu, model):
    graphed = repavit_ops.cuda_graph(model)
    x, others = torch.randn(2, 4), [torch.randn(3), torch.randn(2, 1)]
    for flip in (False, True, False):
        ours, expected = graphed(x, others=others, flip=flip), eager(model, x, others=others, flip=flip)
        torch.testing.assert_close(ours["y"], expected["y"])
        assert ours["pair"][1:] == ("text", None)
        assert ours["shape"] == 2
    assert len(gpu) == 2  # flip is part of the kind
    graphed(x, others=tuple(others))
    assert len(gpu) == 3


@torch.no_grad()
def test_results_are_the_callers_to_keep_and_inputs_stay_untouched(gpu, model):
    graphed = repavit_ops.cuda_graph(model)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    first = graphed(x)
    kept, given = first["y"].clone(), x.clone()
    graphed(y)
    assert torch.equal(first["y"], kept)
    assert torch.equal(x, given)
    first["pair"][0].zero_()  # an output that was the input itself
    assert torch.equal(x, given)
    torch.testing.assert_close(graphed(x)["y"], kept)


@torch.no_grad()
def test_weights_that_stand_elsewhere_are_captured_again(gpu, model):
    graphed = repavit_ops.cuda_graph(model)
    x = torch.randn(2, 4)

    def assigned():
        model.linear.weight = nn.Parameter(torch.randn(3, 4))

    def replaced():
        model.linear.weight.data = torch.randn(3, 4)

    def loaded():
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)

    graphed(x)
    for count, write in enumerate((assigned, replaced, loaded), 2):
        write()
        for _ in range(2):
            torch.testing.assert_close(graphed(x)["y"], eager(model, x)["y"])
        assert len(gpu) == count
    model.linear.bias.data.add_(1)  # in place: the same graph
    torch.testing.assert_close(graphed(x)["y"], eager(model, x)["y"])
    assert len(gpu) == count


@torch.no_grad()
def test_weights_changed_in_place_are_seen_and_moving_resets(gpu, model):
    graphed = repavit_ops.cuda_graph(model)
    x = torch.randn(2, 4)
    graphed(x)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    torch.testing.assert_close(graphed(x)["y"], eager(model, x)["y"])
    assert len(gpu) == 1
    graphed.to(torch.float64)
    assert graphed(x.double())["y"].dtype == torch.float64


def test_autocast_and_grad_modes(gpu, model):
    graphed = repavit_ops.cuda_graph(model)
    x = torch.randn(2, 4)
    with torch.inference_mode():
        plain = graphed(x)["y"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert graphed(x)["y"].dtype == torch.bfloat16
    assert len(gpu) == 2
    with torch.no_grad():  # the graph that was captured in inference mode
        torch.testing.assert_close(graphed(x)["y"], plain)
    assert len(gpu) == 2
    with pytest.raises(RuntimeError, match=r"gradients are wanted.*no_grad"):
        graphed(x)
    model.requires_grad_(False)
    graphed(x)
    with pytest.raises(RuntimeError, match="gradients are wanted"):
        graphed(x.requires_grad_())


@torch.no_grad()
def test_oldest_kind_makes_room_and_says_so_once(gpu, model):
    graphed = repavit_ops.cuda_graph(model, max_graphs=2)
    graphed(torch.zeros(1, 4)), graphed(torch.zeros(2, 4)), graphed(torch.zeros(1, 4))
    with pytest.warns(RuntimeWarning, match="max_graphs=2"):
        graphed(torch.zeros(3, 4))  # in place of two rows
    graphed(torch.zeros(1, 4))
    assert len(gpu) == 3
    graphed(torch.zeros(2, 4))
    assert len(gpu) == 4


@torch.no_grad()
def test_every_call_waits_for_the_one_before(gpu, model):
    graphed = repavit_ops.cuda_graph(model)
    for rows in (1, 2, 1):
        graphed(torch.zeros(rows, 4))
    (event,) = graphed._done.values()
    assert (event.waited, event.recorded) == (3, 3)


@torch.no_grad()
def test_copies_capture_anew(gpu, model):
    graphed = repavit_ops.cuda_graph(model)
    x = torch.randn(2, 4)
    expected = graphed(x)["y"]
    for twin in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        torch.testing.assert_close(twin(x)["y"], expected)
    assert len(gpu) == 3
    assert graphed.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}


@torch.no_grad()
def test_fused_model(gpu):
    model = repavit_ops.create_model("repa_deit_tiny", depth=1, num_classes=5).eval()
    fused = repavit_ops.fuse(model)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(repavit_ops.cuda_graph(fused)(x), fused(x))


@torch.no_grad()
def test_what_cannot_be_captured_says_why(gpu, model):
    with pytest.raises(ValueError, match="max_graphs: got 0"):
        repavit_ops.cuda_graph(model, max_graphs=0)
    with pytest.raises(RuntimeError, match=r"cannot be captured.*training mode"):
        repavit_ops.cuda_graph(copy.deepcopy(model).train())
    with pytest.raises(ValueError, match=r"model: linear.weight is on meta.*model.cuda"):
        repavit_ops.cuda_graph(copy.deepcopy(model).to("meta"))
    graphed = repavit_ops.cuda_graph(model)
    with pytest.raises(ValueError, match="got a tensor on meta"):
        graphed(torch.zeros(1, 4, device="meta"))
    with pytest.raises(ValueError, match="got no tensor"):
        graphed(1)
    with pytest.raises(TypeError, match="must be hashable"):
        graphed(torch.zeros(1, 4), flip={1, 2})
    model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        graphed(torch.zeros(1, 4))


@torch.no_grad()
def test_results_that_are_not_understood(gpu):
    class Odd(nn.Module):
        def forward(self, x):
            return object()

    with pytest.raises(TypeError, match="returned object"):
        repavit_ops.cuda_graph(Odd().eval())(torch.zeros(1))


def test_without_a_gpu(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        repavit_ops.cuda_graph(model)


def test_the_public_name_is_the_function():
    import repavit_ops.cuda_graphs

    assert callable(repavit_ops.cuda_graph)
