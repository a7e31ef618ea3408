"""``torch.fx.symbolic_trace`` and what is built on it: torchvision's and timm's ``create_feature_extractor``.

A deployed module is a leaf of the graph, whichever tracer walks the model: what its forward asks of a tensor (device,
dtype, whether a gradient is wanted) a proxy cannot say, and a packed copy of weights must not be frozen into a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def call_of(module: nn.Module, x: Any, *args: Any) -> Any:
    """The call of ``module`` as one node of the graph that ``x``, a proxy, is being traced into."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *args), {})


def result_of(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """The call of a function as one node, for what looks at arguments that may be proxies too."""
    return x.tracer.create_proxy("call_function", function, (x, *args), {})


def is_proxy(x: Any) -> bool:
    """Whether ``x`` stands for a tensor in a graph that is being traced."""
    return isinstance(x, Proxy)
