"""Whether a call is a plain one, so that a module may take other operators than those its parts would call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .. import backends


def why_not_plain(module: nn.Module, x: Tensor) -> str | None:
    """What of this call, in one line, needs every part of ``module`` called by itself; None if nothing does.

    Only what can change from call to call is looked at; hooks of the module's own parts are not.
    """
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "there are global forward hooks"
    if torch.jit.is_tracing():
        return "the model is traced"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of each operator"
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return "gradients are wanted: call it under torch.no_grad() or torch.inference_mode()"
    if backends.in_forward_mode():
        return "forward-mode derivatives are wanted"
    if backends.in_transform():
        return "a transform of torch.func is going on"
    return None
