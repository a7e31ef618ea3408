"""Hooks that are only there to record: transformers installs some at the first request and leaves them for good.

They do nothing while nobody asks for hidden states or attentions, so blocks with such hooks may still be one call.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

RECORDERS = "transformers.utils.output_capturing"


def recording(what: str | None = None) -> bool:
    """Whether a forward is running whose caller wants what lies between its layers, or just "attentions", say."""
    collector = getattr(sys.modules.get(RECORDERS), "_active_collector", None)
    wanted: dict[str, Any] = (None if collector is None else collector.get()) or {}
    return bool(wanted) and (what is None or what in wanted)


def forget(module: nn.Module) -> None:
    """Remove these hooks from a module and let its model install them again when it is asked to record.

    A fused block takes another's place without its hooks, and the model remembers that it has installed them.
    """
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", None) == RECORDERS:
            del module._forward_hooks[key]
    vars(module).pop("_output_capturing_hooks_installed", None)


def acts(hooks: dict[int, Any]) -> bool:
    """Whether any of a module's hooks does something even while nothing is recorded."""
    return any(getattr(hook, "__module__", None) != RECORDERS for hook in hooks.values())
