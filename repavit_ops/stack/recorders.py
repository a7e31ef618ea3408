"""Hooks that are only there to record: transformers installs some at the first request and leaves them for good.

They do nothing while nobody asks for hidden states or attentions, so blocks with such hooks may still be one call.
"""

from __future__ import annotations

import sys
from typing import Any

RECORDERS = "transformers.utils.output_capturing"


def recording() -> bool:
    """Whether a forward is running whose caller wants what lies between its layers."""
    collector = getattr(sys.modules.get(RECORDERS), "_active_collector", None)
    return collector is not None and bool(collector.get())


def acts(hooks: dict[int, Any]) -> bool:
    """Whether any of a module's hooks does something even while nothing is recorded."""
    return any(getattr(hook, "__module__", None) != RECORDERS for hook in hooks.values())
