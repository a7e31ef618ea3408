"""repavit_ops: train, merge, fuse and verify reparameterized Vision Transformers.

    model = repavit_ops.load_checkpoint("repa_deit_base.pth", num_heads=12, idle_ratio=0.75)
    fast = repavit_ops.fuse(model)

Importing never fails because a backend is missing and never asks the hardware; ``python -m repavit_ops info`` says what
is available and why the rest is not.
"""

from typing import TYPE_CHECKING, Any

from . import models, moved, nn, ops, reparam
from .checkpoints import load_checkpoint, save_checkpoint
from .cuda_graphs import cuda_graph
from .fusing import FusionReport, can_fuse, fuse, fusion_report, reparameterize
from .models import create_model, list_models
from .nn import JoinSchedule, recalibrate_bn, set_join
from .verification import VerificationReport, verify
from .version import __version__

if TYPE_CHECKING:
    from .idling import distill, distill_blocks, idle_pretrained

__all__ = [
    "FusionReport",
    "JoinSchedule",
    "VerificationReport",
    "__version__",
    "can_fuse",
    "create_model",
    "cuda_graph",
    "distill",
    "distill_blocks",
    "fuse",
    "fusion_report",
    "idle_pretrained",
    "list_models",
    "load_checkpoint",
    "models",
    "nn",
    "ops",
    "recalibrate_bn",
    "reparam",
    "reparameterize",
    "save_checkpoint",
    "set_join",
    "verify",
]

moved.install()
EXTRAS = ("distill", "distill_blocks", "idle_pretrained")  # loaded when they are asked for: the core does without


def __getattr__(name: str) -> Any:
    if name not in EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import idling

    return getattr(idling, name)
