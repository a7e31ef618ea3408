"""The papers' tables on this machine: size, work and speed of every form of a model, beside what the papers print."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fusing import fuse, reparameterize
from ..models import complexity, create_model
from ..models.complexity import Complexity
from . import slab, slab_models
from .measuring import OWN_SLACK, PEER_SLACK, Call, Case, Limits, Measured, Progress, Provider, measure
from .models import float64_of, images_for, seeded_model
from .papers import DEPLOYED, JOINED, OTHER, TABLES, TRAINING, VANILLA, PaperRow

PLAIN, FUSED = "plain", "fused"
QUICK = ("1", "4", "depth")  # tables


class Group(NamedTuple):
    """Rows that are timed together; ratios are to the first of them."""

    table: str
    rows: tuple[PaperRow, ...]

    @property
    def name(self) -> str:
        return f"table {self.table}, {self.rows[0].label}"


@dataclass(frozen=True)
class MethodRow:
    """One line of a table.

    Attributes:
        paper: the row as printed. counted: parameters and MACs of the model itself; None where it is not built here.
        rates: images per second, "plain" in PyTorch and "fused".
        ratios: those over the group's first row, plain to plain and fused to fused. paper_ratio: the paper's.
    """

    paper: PaperRow
    counted: Complexity | None
    rates: Mapping[str, float]
    ratios: Mapping[str, float]
    paper_ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        row: dict[str, Any] = {"table": self.paper.table, "backbone": backbone(self.paper)}
        row |= {"label": self.paper.label, "form": self.paper.form}
        if self.counted is not None:
            row |= {"params": self.counted.params, "macs": self.counted.macs}
        row |= {"images_per_second": dict(self.rates), "ratios": dict(self.ratios), "paper_ratio": self.paper_ratio}
        printed = ("mparams", "gmacs", "speed", "accuracy", "gain")
        return row | {"paper": {name: getattr(self.paper, name) for name in printed}}


def groups_of(tables: Iterable[str], quick: bool = False) -> list[Group]:
    """Rows of these tables by backbone; with ``quick`` the smallest backbone of each alone.

    Raises:
        ValueError: an unknown table.
    """
    found = []
    for table in tables:
        if table not in TABLES:
            raise ValueError(f"table: got {table!r}, wanted one of {', '.join(TABLES)}")
        backbones: dict[str, list[PaperRow]] = {}
        for row in TABLES[table]:
            backbones.setdefault(backbone(row), []).append(row)
        kept = [Group(table, tuple(rows)) for rows in backbones.values()]
        found += kept[:1] if quick else kept
    return found


def backbone(row: PaperRow) -> str:
    """What a row's ratio is to: rows of one backbone are timed together."""
    return "vit_tiny" if row.table == "depth" else row.family.removeprefix("slab_")


def measure_group(
    group: Group, batch: int, dtype: torch.dtype, limits: Limits, progress: Progress = lambda text, share: None
) -> list[MethodRow]:
    """Check and time a group's rows in one run.

    Raises:
        AssertionError: a form computes something else than its model in float64.
    """
    forms = [(row, _Forms(row, batch, dtype)) for row in group.rows if is_built(row)]
    providers = {key: provider for _, form in forms for key, provider in form.providers().items()}
    truths = {form.truth: form.float64 for _, form in forms}
    measured = measure(Case(group.name, dtype, batch, providers, truths), limits, progress)
    first = group.rows[0]
    bases = _rates(first, measured)
    lines = []
    for row in group.rows:
        rates = _rates(row, measured)
        # a first row that is never fused is what fused ones are compared with
        ratios = {kind: rate / bases.get(kind, bases[PLAIN]) for kind, rate in rates.items() if bases}
        lines.append(MethodRow(row, size_of(row), rates, ratios, paper_ratio(row, first)))
    return lines


def paper_ratio(row: PaperRow, first: PaperRow) -> float | None:
    """The paper's images per second over those of the group's first row."""
    if row.gain is not None:
        return 1 + row.gain / 100
    return None if row.speed is None or first.speed is None else row.speed / first.speed


def is_built(row: PaperRow) -> bool:
    """Whether a row's model is built here."""
    return row.form != OTHER or row.family in slab_models.MODELS


def kinds_of(row: PaperRow) -> tuple[str, ...]:
    """The kinds that a row's model runs in."""
    if not is_built(row):
        return ()
    return (PLAIN,) if row.form in (TRAINING, OTHER) else (PLAIN, FUSED)


def size_of(row: PaperRow) -> Complexity | None:
    """Parameters and MACs, without weights; None for models that are not built here."""
    if not is_built(row):
        return None
    if row.family in slab_models.MODELS:
        with torch.device("meta"):
            return slab_models.slab_complexity(slab_models.MODELS[row.family]("deployed"))
    if row.form == JOINED:
        return complexity(reparameterize(seeded_model(row.model)))
    options = row.options | ({"form": "deployed"} if row.form == DEPLOYED else {})
    with torch.device("meta"):
        model = create_model(row.model, **options)
    return complexity(model, attention_products=row.attention_products)


def _key(row: PaperRow, kind: str) -> str:
    form = " training" if row.form == TRAINING else ""
    return f"{row.label}{form}, {kind}"


def _rates(row: PaperRow, measured: Measured) -> dict[str, float]:
    return {kind: measured.images_per_second(_key(row, kind)) for kind in kinds_of(row)}


class _Forms:
    """A row's model: plain, fused, and its float64 result."""

    def __init__(self, row: PaperRow, batch: int, dtype: torch.dtype) -> None:
        self.row, self.batch, self.dtype = row, batch, dtype
        self.truth = f"{row.model} {row.options}"

    @functools.cached_property
    def model(self) -> nn.Module:
        if self.row.family in slab_models.MODELS:
            return slab_models.seeded_slab(self.row.family)
        return seeded_model(self.row.model, **self.row.options)

    @functools.cached_property
    def x(self) -> Tensor:
        return images_for(self.model, self.batch, self.dtype)

    def float64(self) -> Tensor:
        return float64_of(self.model, self.x.float())

    def providers(self) -> dict[str, Provider]:
        ways: dict[str, tuple[Callable[[], Call], float]] = {
            PLAIN: (self.plain, PEER_SLACK),  # merged, it rounds elsewhere than the training form does
            FUSED: (self.fused, OWN_SLACK),
        }
        kinds = kinds_of(self.row)
        return {_key(self.row, kind): Provider(ways[kind][0], self.truth, True, ways[kind][1]) for kind in kinds}

    def plain(self) -> Call:
        model = self.model
        if isinstance(model, slab_models.SlabModel):
            model = slab.merged(model)
        elif self.row.form not in (VANILLA, TRAINING):
            model = reparameterize(model)
        return functools.partial(model if self.dtype == torch.float32 else copy.deepcopy(model).to(self.dtype), self.x)

    def fused(self) -> Call:
        return functools.partial(fuse(self.model, dtype=self.dtype, keep_unpacked=False), self.x)
