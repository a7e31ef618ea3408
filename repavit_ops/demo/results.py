"""What the demo found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..verification import VerificationReport
from .throughput import Rate
from .training import Epoch


@dataclass
class DigitsRow:
    """One form of one small model. ``changed``: held-out predictions that differ from the trained form's."""

    model: str
    form: str
    accuracy: float
    params: int
    macs: int
    changed: int
    check: VerificationReport | None
    rate: Rate | None = None


@dataclass
class LargeRow:
    """One form of one large model at one batch size; ``check`` compares the fused with the training form."""

    model: str
    form: str
    batch: int
    params: int
    macs: int
    rate: Rate
    check: VerificationReport | None


@dataclass
class Results:
    """Everything that tables, plot and JSON are made of. ``batch``: digits per timed call."""

    machine: dict[str, Any]
    seed: int
    held_out: int
    batch: int
    made_of: dict[str, str] = field(default_factory=dict)
    courses: dict[str, list[Epoch]] = field(default_factory=dict)
    digits: list[DigitsRow] = field(default_factory=list)
    large: list[LargeRow] = field(default_factory=list)
    samples: list[tuple[Tensor, int, int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; nothing that names the machine beyond its CPU, GPU and versions."""
        return {
            "machine": self.machine,
            "seed": self.seed,
            "held_out": self.held_out,
            "batch": self.batch,
            "models": self.made_of,
            "training": {name: [asdict(epoch) for epoch in course] for name, course in self.courses.items()},
            "digits": [_plain(row) for row in self.digits],
            "large": [_plain(row) for row in self.large],
        }


def _plain(row: DigitsRow | LargeRow) -> dict[str, Any]:
    check, rate = row.check, row.rate
    data = {key: value for key, value in vars(row).items() if key not in ("check", "rate")}
    return {
        **data,
        "images_per_second": None if rate is None else rate._asdict(),
        "verified": None if check is None else {"passed": check.passed, "output": asdict(check.output)},
    }
