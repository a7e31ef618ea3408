"""Names under which older code and pickles know what stands elsewhere now; they keep working."""

from __future__ import annotations

import sys

from . import checkpoints, models, nn, stack

MODULES = {"repavit_ops.nn.fused_stack": stack.fused_stack}  # pickles of whole fused models name this one
NAMES = (
    (nn, "FusedStack", stack.FusedStack),
    (models, "load_checkpoint", checkpoints.load_checkpoint),
    (models, "save_checkpoint", checkpoints.save_checkpoint),
)


def install() -> None:
    """Let the old names lead to the new places."""
    sys.modules.update(MODULES)
    for module, name, value in NAMES:
        setattr(module, name, value)
