"""Everybody who writes weights: each function gives all parameters of a module other values, in a way of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Writer = Callable[[nn.Module], object]


def others(p: Tensor, seed: int = 7) -> Tensor:
    """Other values for a parameter, of the size of its own."""
    generator = torch.Generator().manual_seed(seed + p.numel())
    noise = torch.empty(p.shape, dtype=p.dtype).normal_(0, 1, generator=generator)
    return noise * (0.5 * p.detach().std(correction=0) + 0.02)


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters()


def _optimizer(kind: type[torch.optim.Optimizer], compiled: bool = False, **config: object) -> Writer:
    def step(module: nn.Module) -> None:
        wanted = {p: p.requires_grad for p in parameters(module)}
        for p in wanted:
            p.requires_grad_(True)
            p.grad = others(p)
        optimizer = kind(list(wanted), lr=0.1, **config)
        (torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step)()
        for p, want in wanted.items():
            p.grad = None
            p.requires_grad_(want)

    return step


def _each(write: Callable[[Tensor], object]) -> Writer:
    def every(module: nn.Module) -> None:
        for p in parameters(module):
            write(p)

    return every


@torch.no_grad()
def _in_place(p: Tensor) -> None:
    p.add_(others(p))


@torch.inference_mode()
def _in_place_without_counters(p: Tensor) -> None:
    p.add_(others(p))


def _data_in_place(p: Tensor) -> None:
    p.data.add_(others(p))


def _data_replaced(p: Tensor) -> None:
    p.data = p.detach() + others(p)


def _data_clipped(p: Tensor) -> None:
    p.data.clamp_(-0.7 * p.data.abs().max(), 0.2 * p.data.abs().max())


def _offloaded_and_back(p: Tensor) -> None:
    kept = p.detach() + others(p)
    p.data = torch.empty(0)
    p.data = kept


def _storage_freed_and_back(p: Tensor) -> None:
    kept = (p.detach() + others(p)).contiguous()
    storage = p.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    storage.copy_(kept.untyped_storage())


def _storage_copied_into(p: Tensor) -> None:
    p.untyped_storage().copy_((p.detach() + others(p)).contiguous().untyped_storage())


def _numpy(p: Tensor) -> None:
    array = p.detach().numpy()
    array += others(p).numpy()


def _dlpack(p: Tensor) -> None:
    array = np.from_dlpack(p.detach())
    torch.from_numpy(array).add_(others(p))


def _drawn_anew(p: Tensor) -> None:
    nn.init.trunc_normal_(p.data, std=0.1)


def _vector(module: nn.Module) -> None:
    vector = parameters_to_vector(parameters(module)).detach()
    vector_to_parameters(vector * 1.3, parameters(module))


def _foreach_data(module: nn.Module) -> None:
    data = [p.data for p in parameters(module)]
    torch._foreach_lerp_(data, [others(p) for p in data], 0.5)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value + others(value) for name, value in module.state_dict().items()}


def _loaded(module: nn.Module) -> None:
    module.load_state_dict(_state(module))


def _loaded_by_assignment(module: nn.Module) -> None:
    module.load_state_dict(_state(module), assign=True)


def _loaded_by_swapping(module: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        _loaded(module)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _assigned(module: nn.Module) -> None:
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(p.detach() + others(p), requires_grad=p.requires_grad))


def _there_and_back(module: nn.Module) -> None:
    module.to(torch.float64)
    _each(_data_in_place)(module)
    module.to(torch.float32)


def _average(module: nn.Module) -> None:
    """An exponential moving average that is copied back, as trainers do before evaluation."""
    shadow = [p.detach().clone() for p in parameters(module)]
    for _ in range(3):
        torch._foreach_lerp_(shadow, [p.detach() + others(p) for p in parameters(module)], 0.3)
    for p, mean in zip(parameters(module), shadow, strict=True):
        p.data.copy_(mean)


def _low_rank(module: nn.Module) -> None:
    """A LoRA adapter, merged."""
    for p in parameters(module):
        if p.dim() == 2:
            a, b = others(p[:2]), others(p[:, :2])
            p.data += 2.0 * (b @ a) / p.detach().std(correction=0)


def _low_rank_taken_out(module: nn.Module) -> None:
    """A LoRA adapter of other values, taken out of weights that it was merged into."""
    before = copy.deepcopy(module.state_dict())
    _low_rank(module)
    for p, old in zip(parameters(module), before.values(), strict=True):
        p.data.sub_(1.5 * (p.data - old))


# Where a writer needs every parameter in memory of its own kind, it is said in FORMS of test_written_weights.
WRITERS: dict[str, Writer] = {
    "SGD fused": _optimizer(torch.optim.SGD, fused=True),
    "Adam fused": _optimizer(torch.optim.Adam, fused=True),
    "AdamW fused": _optimizer(torch.optim.AdamW, fused=True),
    "Adagrad fused": _optimizer(torch.optim.Adagrad, fused=True),
    "AdamW": _optimizer(torch.optim.AdamW),
    "SGD foreach": _optimizer(torch.optim.SGD, foreach=True),
    "AdamW compiled": _optimizer(torch.optim.AdamW, compiled=True),
    "in place": _each(_in_place),
    "in place, inference mode": _each(_in_place_without_counters),
    ".data in place": _each(_data_in_place),
    ".data clipped": _each(_data_clipped),
    ".data replaced": _each(_data_replaced),
    "offloaded and back": _each(_offloaded_and_back),
    "storage freed and back": _each(_storage_freed_and_back),
    "storage copied into": _each(_storage_copied_into),
    "numpy": _each(_numpy),
    "DLPack": _each(_dlpack),
    "drawn anew": _each(_drawn_anew),
    "vector_to_parameters": _vector,
    "foreach on data": _foreach_data,
    "load_state_dict": _loaded,
    "load_state_dict, assign": _loaded_by_assignment,
    "load_state_dict, swap": _loaded_by_swapping,
    "assigned": _assigned,
    "to float64 and back": _there_and_back,
    "average": _average,
    "LoRA merged": _low_rank,
    "LoRA taken out": _low_rank_taken_out,
}
