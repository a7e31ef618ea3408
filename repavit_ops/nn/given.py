"""What the verbs do with a model as it was given: wrappers come off, and what holds no usable weights is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

PLAIN = (Tensor, nn.Parameter)
EXACT_DEVICES = ("cpu", "cuda")  # types of device that are known to compute in float64
UNFUSED = (
    "the weights of merged or fused blocks: the state dict is of a model that is neither; load it into the model "
    "before repavit_ops.reparameterize or fuse, and call that again"
)
SHARDED = "torch.distributed.fsdp"


def unwrapped(model: nn.Module, keep_compiled: bool = False, label: str = "model") -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, torch.compile's and AveragedModel's wrappers.

    Each of them keeps something of the parameters that it was made for (buckets of gradients, replicas, a compiled
    call, an average), which a changed model would not have. ``keep_compiled``: torch.compile's stays on.

    Raises:
        TypeError: it is no module, but a name, a state dict or the like.
    """
    require_module(model, label)
    while (name := _inner(model)) is not None and not (keep_compiled and is_compiled(model)):
        model = getattr(model, name)
    return model


def processes_of(model: nn.Module) -> int:
    """How many processes average the gradients of a model, by the DistributedDataParallel among its wrappers."""
    while (name := _inner(model)) is not None:
        if isinstance(model, DistributedDataParallel):
            return torch.distributed.get_world_size(model.process_group)
        model = getattr(model, name)
    return 1


def is_compiled(model: nn.Module) -> bool:
    """Whether a model is what ``torch.compile`` returns, whose parts cannot be watched."""
    return _is("torch._dynamo.eval_frame", "OptimizedModule", model)


def _inner(model: nn.Module) -> str | None:
    """Name of the model that a wrapper holds; None for what is no wrapper."""
    if isinstance(model, DistributedDataParallel | DataParallel) or _is(
        "torch.optim.swa_utils", "AveragedModel", model
    ):
        return "module"
    return "_orig_mod" if is_compiled(model) else None


def _is(module: str, name: str, model: nn.Module) -> bool:
    """Whether a model is of a class of PyTorch's that may not have been imported; then it is not."""
    cls: Any = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(model, cls)


def require_module(model: Any, label: str = "model") -> None:
    """Raise TypeError, naming what came, if it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{label}: got {type(model).__name__}, wanted a torch.nn.Module that holds its weights")


def require_weights(model: nn.Module, verb: str, label: str = "model") -> None:
    """Raise ValueError, naming the place and the fix, if weights of the model are on the meta device or sharded."""
    require_unsharded(model, verb)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{label}: its {name} is on the meta device, which holds no values to {verb}; load the weights first "
                "(load_state_dict(state, assign=True), or to_empty(device=...) and load_state_dict(state))"
            )


def require_unsharded(model: nn.Module, verb: str) -> None:
    """Raise ValueError, naming the place and the fix, if a part is FullyShardedDataParallel, whose weights are flat."""
    require_module(model)
    if (reason := _sharded_by("FullyShardedDataParallel", model, verb)) is not None:
        raise ValueError(f"model: {reason}")


def require_whole(model: nn.Module, verb: str, label: str = "model") -> None:
    """As :func:`require_unsharded`, and refuse parts under fully_shard: for verbs that need plain tensors."""
    if (reason := why_sharded(model, verb)) is not None:
        raise ValueError(f"{label}: {reason}")


def why_sharded(model: nn.Module, verb: str) -> str | None:
    """What part of a model is sharded and how its weights are gathered; None if none is."""
    flat = _sharded_by("FullyShardedDataParallel", model, verb)
    return flat or _sharded_by("FSDPModule", model, verb)


def _sharded_by(cls: str, model: nn.Module, verb: str) -> str | None:
    for name, module in model.named_modules():
        if _is(SHARDED, cls, module):
            kind = "a module under fully_shard" if cls == "FSDPModule" else type(module).__name__
            return (
                f"got {kind} at {name or 'its root'}, wanted whole weights to {verb}; gather them with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), load that into the model that is not sharded, and "
                f"{verb} it"
            )
    return None


def copied(model: nn.Module, verb: str) -> nn.Module:
    """A deep copy, or ValueError that says why there can be none and what to do."""
    require_whole(model, verb)
    try:
        return copy.deepcopy(model)
    except Exception as error:  # any part of the model may have its own reasons
        raise ValueError(
            f"model: {type(model).__name__} cannot be copied ({str(error).splitlines()[0]}); remove what is in the "
            f"way (torch.nn.utils.prune.remove, remove_weight_norm), or {verb} it with inplace=True"
        ) from error


def cast_real(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its real tensors cast. ``model.to(dtype)`` casts complex ones too, to their real part."""
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def tell_unfused(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, missing: list[str], unexpected: list[str]
) -> None:
    """One sentence in place of all keys that a fused module misses, where a state dict holds others for it instead.

    Called behind ``_load_from_state_dict``: what it found missing and unexpected becomes the text of PyTorch's error,
    or what ``strict=False`` returns.
    """
    given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    own = {name for name, _ in module.named_parameters()}
    if not given or not own or given & own:
        return
    for keys in (missing, unexpected):
        keys[:] = [key for key in keys if not key.startswith(prefix)]
    if UNFUSED not in missing:
        missing.append(UNFUSED)


def is_plain(t: Tensor) -> bool:
    """Whether a weight is PyTorch's own tensor or parameter, and no tensor of another class dressed as one."""
    return type(t) in PLAIN and type(t.data) is Tensor


def reason_against_weights(module: nn.Module) -> str | None:
    """Why weights of a module cannot be folded, in one line: they are of a class of their own; None if they can."""
    for name, p in module.named_parameters():
        if not is_plain(p):
            kind = type(p) if type(p) not in PLAIN else type(p.data)
            return (
                f"its {name} is a {kind.__module__}.{kind.__name__}, no plain tensor; fuse before weights are "
                "quantised, sharded or otherwise replaced"
            )
    return None


def other_device(model: nn.Module) -> torch.device | None:
    """The device of a model, where that may lack float64 (MPS, XLA, …); None on CPUs and CUDA devices."""
    devices = {p.device for p in (*model.parameters(), *model.buffers()) if p.device.type not in EXACT_DEVICES}
    return next(iter(devices)) if len(devices) == 1 else None
