"""repavit_ops: train, merge, fuse and verify reparameterized Vision Transformers.

    model = repavit_ops.load_checkpoint("repa_deit_base.pth", num_heads=12, idle_ratio=0.75)
    fast = repavit_ops.fuse(model)

Importing never fails because a backend is missing and never asks the hardware; ``python -m repavit_ops info`` says what
is available and why the rest is not.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import models, moved, nn, ops, reparam
from .checkpoints import load_checkpoint, save_checkpoint
from .fusing import FusionReport, can_fuse, fuse, fusion_report, reparameterize
from .models import create_model, list_models
from .nn import JoinSchedule, recalibrate_bn, set_join
from .version import __version__

if TYPE_CHECKING:
    from . import exporting as exporting
    from . import idling as idling
    from . import predicting as predicting
    from . import profiling as profiling
    from . import testing as testing
    from .checkpoints.packed_models import load_packed, save_packed
    from .cuda_graphs import cuda_graph
    from .idling import distill, distill_blocks, idle_pretrained
    from .predicting import Predictor
    from .verification import VerificationReport, verify

__all__ = [
    "FusionReport",
    "JoinSchedule",
    "Predictor",
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
    "load_packed",
    "models",
    "nn",
    "ops",
    "recalibrate_bn",
    "reparam",
    "reparameterize",
    "save_checkpoint",
    "save_packed",
    "set_join",
    "verify",
]

moved.install()
LATER = {  # loaded when they are asked for: extras, which the core does without, and what a model in use does not need
    **dict.fromkeys(("distill", "distill_blocks", "idle_pretrained"), "idling"),
    **dict.fromkeys(("VerificationReport", "verify"), "verification"),
    **dict.fromkeys(("load_packed", "save_packed"), "checkpoints.packed_models"),
    "Predictor": "predicting",
    "cuda_graph": "cuda_graphs",
}
MODULES_LATER = ("exporting", "idling", "predicting", "profiling", "testing")


def __getattr__(name: str) -> Any:
    if name in MODULES_LATER:
        return importlib.import_module(f".{name}", __name__)
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{LATER[name]}", __name__), name)
    globals()[name] = value
    return value
