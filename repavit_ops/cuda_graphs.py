"""``cuda_graph(model)``: a model whose launches are recorded once per kind of input and then replayed as one."""

from __future__ import annotations

import operator
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .nn.given import require_whole, unwrapped
from .nn.mode import require_eval

GPU = "cuda"
WARM_UP = 3  # calls before a capture: kernels compile, libraries choose algorithms, allocators settle
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))  # what may stand beside tensors in a result


def cuda_graph(model: nn.Module, *, max_graphs: int = 16) -> GraphedModel:
    """Wrap a model for inference on a GPU: one CUDA graph per kind of input, captured at its first call.

    At small batches a model waits for its launches: some hundred per image, 5 to 10 µs each. A graph launches once.
    A kind of input is the shapes, dtypes and devices of its tensors, its other arguments, and the autocast dtype. The
    first call of a kind runs the model ``WARM_UP`` times and captures; later calls copy the tensors into the graph's
    own, replay, and return clones of its results, which are the caller's to keep. Calls from several streams or
    threads follow each other.

    Args:
        model: fused or not, in evaluation mode, all of it on one or more GPUs; anything that can be captured (no
            ``.item()``, no choice by data).
        max_graphs: kinds kept; the one that was used longest ago makes room, with a warning at the first time.

    Returns:
        A module with the same call. Weights may be changed: in place the graphs read the new ones, and where a
        parameter or buffer has come to stand in other memory (``.data =``, assignment, ``.to()``) they are captured
        again. Tensors that the model holds elsewhere are not looked at: call its ``reset()`` if one is replaced.

    Raises:
        RuntimeError: there is no CUDA device; a part is in training mode; at a call, gradients are wanted.
        ValueError: weights are sharded; the model or, at a call, a tensor is not on a GPU; ``max_graphs`` < 1.
        TypeError: at a call, an argument that is no tensor cannot be hashed, or a result holds something else than
            tensors, numbers and strings in tuples, lists and dicts.
    """
    model = unwrapped(model, keep_compiled=True)
    require_whole(model, "capture")
    if not torch.cuda.is_available():
        raise RuntimeError("cuda_graph: no CUDA device is visible to torch; call the model itself")
    if max_graphs < 1:
        raise ValueError(f"max_graphs: got {max_graphs}, wanted at least 1")
    require_eval(model, "captured")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != GPU:
            raise ValueError(f"model: {name} is on {tensor.device}, wanted a GPU; move it with model.cuda()")
    return GraphedModel(model, max_graphs)


@dataclass(frozen=True)
class _Weights:
    """Where the parameters and buffers of a model stand, which a graph reads at their addresses.

    Columns, compared by ``map`` in C: at batch 1 a model of 150 parameters waits for nothing else.
    """

    dicts: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> _Weights:
        places = [
            (entries, name, tensor)
            for part in model.modules()
            for entries in (part._parameters, part._buffers)
            for name, tensor in entries.items()
            if tensor is not None
        ]
        dicts, names, tensors = zip(*places, strict=True) if places else ((), (), ())
        return cls(dicts, names, tensors, tuple(map(Tensor.data_ptr, tensors)))

    def stand(self) -> bool:
        """Whether all are still the same tensors in the same memory."""
        found = map(dict.get, self.dicts, self.names)
        return all(map(operator.is_, found, self.tensors)) and all(
            map(operator.eq, map(Tensor.data_ptr, self.tensors), self.addresses)
        )


@dataclass
class _Graph:
    """One captured kind of input: its tensors and its results, in flat order, are the graph's own memory."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: list[Any]
    result_spec: TreeSpec
    weights: _Weights

    def replay(self, tensors: list[Tensor]) -> Any:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return tree_unflatten([r.clone() if isinstance(r, Tensor) else r for r in self.results], self.result_spec)


class GraphedModel(nn.Module):
    """What :func:`cuda_graph` returns; ``model`` is the wrapped one."""

    def __init__(self, model: nn.Module, max_graphs: int) -> None:
        super().__init__()
        self.model = model
        self.max_graphs = max_graphs
        self.train(False)
        self._begin()

    def _begin(self) -> None:
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._pool: Any = None  # one for all graphs, since they never run at the same time
        self._done: dict[torch.device, torch.cuda.Event] = {}  # the last replay on each device
        self._lock = threading.Lock()
        self._warned = False

    def reset(self) -> None:
        """Forget every graph; the next call of each kind captures anew."""
        self._begin()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._check(tensors)
        key, device = _kind(leaves, spec), tensors[0].device
        with self._lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            done = self._done.setdefault(device, torch.cuda.Event())
            torch.cuda.current_stream().wait_event(done)  # all graphs share their memory
            if key in self._graphs and not self._graphs[key].weights.stand():
                torch.cuda.synchronize(device)  # no replay may still run when its memory goes
                self._graphs.clear()
            if key not in self._graphs:
                self._make_room()
                self._graphs[key] = self._capture(leaves, spec)
            self._graphs.move_to_end(key)
            result = self._graphs[key].replay(tensors)
            done.record()
        return result

    def _check(self, tensors: list[Tensor]) -> None:
        if self.model.training:
            raise RuntimeError("cuda_graph: the model is in training mode; call model.eval()")
        if not tensors:
            raise ValueError("cuda_graph: got no tensor, wanted at least one on a GPU")
        for tensor in tensors:
            if tensor.device.type != GPU:
                raise ValueError(f"cuda_graph: got a tensor on {tensor.device}, wanted a GPU; move it with .cuda()")
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *self.model.parameters())):
            raise RuntimeError(
                "cuda_graph: gradients are wanted, which a replay has none of; call it under torch.no_grad() or "
                "torch.inference_mode()"
            )

    def _capture(self, leaves: list[Any], spec: TreeSpec) -> _Graph:
        """Run the model on tensors of its own until it is warm, then record it."""
        weights = _Weights.of(self.model)
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(own, spec)
        autocast = torch.autocast(
            GPU,
            dtype=torch.get_autocast_dtype(GPU),
            enabled=torch.is_autocast_enabled(GPU),
            cache_enabled=False,  # a cast weight must not be freed while the graph reads it
        )
        with autocast:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.model(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side):  # torch's default is of the first device
                output = self.model(*args, **kwargs)
        results, result_spec = tree_flatten(output)
        for result in results:
            if not isinstance(result, (Tensor, *PLAIN)):
                raise TypeError(
                    f"cuda_graph: the model returned {type(result).__name__}, wanted tensors, numbers and strings "
                    "in tuples, lists and dicts"
                )
        return _Graph(graph, [t for t in own if isinstance(t, Tensor)], results, result_spec, weights)

    def _make_room(self) -> None:
        if len(self._graphs) < self.max_graphs:
            return
        self._graphs.popitem(last=False)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"cuda_graph: more than max_graphs={self.max_graphs} kinds of input; the oldest are captured again "
                "when they return, which is slow: raise max_graphs, or pad inputs to fewer shapes",
                RuntimeWarning,
                stacklevel=4,
            )

    def _apply(self, fn: Any, recurse: bool = True) -> GraphedModel:
        super()._apply(fn, recurse)
        self.reset()
        return self

    def __getstate__(self) -> dict[str, Any]:
        private = ("_graphs", "_pool", "_done", "_lock", "_warned")
        return {name: value for name, value in self.__dict__.items() if name not in private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def extra_repr(self) -> str:
        return f"{len(self._graphs)} of at most {self.max_graphs} graphs"


def _kind(leaves: list[Any], spec: TreeSpec) -> tuple[Any, ...]:
    """What tells one graph from another; raises TypeError where an argument cannot be part of it."""

    def of(leaf: Any) -> Any:
        return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)

    autocast = torch.get_autocast_dtype(GPU) if torch.is_autocast_enabled(GPU) else None
    key = (str(spec), autocast, *(of(leaf) for leaf in leaves))
    try:
        hash(key)
    except TypeError as error:
        raise TypeError(f"cuda_graph: arguments that are no tensors must be hashable ({error})") from error
    return key
