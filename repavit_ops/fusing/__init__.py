"""The verbs that change a model, the rules they go by, and the report of what they did."""

from . import families as _families  # fills the table of rules  # noqa: F401
from .report import FusionReport, fusion_report
from .rules import can_fuse
from .verbs import TRAINING_FORMS, fuse, reparameterize

__all__ = ["TRAINING_FORMS", "FusionReport", "can_fuse", "fuse", "fusion_report", "reparameterize"]
