"""What ``repavit-ops tune --cpu`` measured on this CPU, and which form ``backend="auto"`` therefore takes.

Nothing here runs a kernel or writes of itself. There is one JSON file per CPU and level, in the folder that the
environment variable REPAVIT_TUNED names, else in the user's cache. It holds for the versions that measured it alone.
A deployed module asks once, when it packs its weights; a call then costs nothing where the kernels are taken.

Until a table says otherwise the C++ kernels are taken, but for bfloat16 where the processor has AMX and the kernels
cannot use it: PyTorch's products are then likely faster.
"""

from __future__ import annotations

import bisect
import datetime
import functools
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends
from .version import __version__

Batches = tuple[tuple[float, float], ...]  # intervals (more than, at most) of batch sizes
EVERY: Batches = ((0.0, math.inf),)
CHOICES = ("cpp", "pytorch")
GAIN = 1.03  # PyTorch's own form is taken where it is faster by at least this
COMMAND = "repavit-ops tune --cpu MODEL..."


@dataclass(frozen=True)
class Operation:
    """What an operator does in a model, apart from how much of it at once.

    Args:
        operator: its name.
        dtype: of weights and tokens, without "torch.".
        weights: names and shapes: "w_in 384x384, b_in 384, …".
        form: what of its arguments changes the work: "approximate none, norm layer, norm_eps, residual".
        threads: PyTorch's.
    """

    operator: str
    dtype: str
    weights: str
    form: str
    threads: int

    @classmethod
    def of(
        cls, operator: str, dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor | None]], static: Mapping[str, Any]
    ) -> Operation:
        """The operation of these tensors by name, and keyword arguments, on as many threads as PyTorch has now."""
        weights = ", ".join(f"{name} {_times(t.shape)}" for name, t in tensors if t is not None)
        told = (_told(name, value) for name, value in sorted(static.items()))
        form = ", ".join(text for text in told if text)
        return cls(operator, str(dtype).removeprefix("torch."), weights, form, torch.get_num_threads())


@dataclass(frozen=True)
class Measured:
    """One operation on a tensor of this size (without the batch): µs of our kernel and of PyTorch's own form.

    ``choice`` is "cpp" or "pytorch". A kernel whose result was wrong has infinite ``us``.
    """

    operation: Operation
    size: tuple[int, ...]
    batch: int
    us: float
    pytorch_us: float
    choice: str

    @classmethod
    def of(cls, operation: Operation, size: Sequence[int], batch: int, us: float, pytorch_us: float) -> Measured:
        """With the choice that these times make: PyTorch where it is faster by :data:`GAIN`."""
        choice = "pytorch" if pytorch_us * GAIN <= us else "cpp"
        return cls(operation, tuple(size), batch, round(us, 2), round(pytorch_us, 2), choice)


@dataclass(frozen=True)
class Choice:
    """Where ``backend="auto"`` takes PyTorch's own form of one operation.

    Attributes:
        sizes: measured sizes of the tensor (without the batch), and the batches at which it is PyTorch's; those that
            are the kernel's at every batch only where others are PyTorch's.
        others: the batches at sizes that were not measured: all or none.
        programs: whether compiled and exported programs have PyTorch's form, which must not ask for sizes.
        autocast: whether autocast to bfloat16 has.
        why: in one line.
    """

    sizes: tuple[tuple[tuple[int, ...], Batches], ...]
    others: Batches
    programs: bool
    autocast: bool
    why: str

    def batches(self, size: Sequence[int]) -> Batches:
        """The batches at which a tensor of this size goes to PyTorch."""
        return next((batches for known, batches in self.sizes if known == tuple(size)), self.others)

    def takes_pytorch(self, x: Tensor) -> bool:
        """Whether ``x`` goes to PyTorch."""
        if torch.is_autocast_enabled("cpu"):  # the kernels would have to pack at every call, which is not measured
            return self.autocast and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if torch.compiler.is_compiling():
            return self.programs
        return x.dim() > 0 and within(x.shape[0], self.batches(x.shape[1:]))

    def __str__(self) -> str:
        places = [f"{_times(size)} at {_range(batches)}" for size, batches in self.sizes if batches]
        rest = ["what was not measured"] if self.others and self.sizes else []
        return "PyTorch's own form" + (f" for {', '.join([*places, *rest])}" if places or rest else "")

    @property
    def kernel_never(self) -> bool:
        """Whether no call takes the kernel and nothing was measured, so that nothing need be packed."""
        return self.others == EVERY and not self.sizes

    @property
    def empty(self) -> bool:
        return not self.sizes and not self.others and not self.autocast


def within(batch: int, batches: Batches) -> bool:
    return any(low < batch <= high for low, high in batches)


def choose(operation: Operation) -> Choice | None:
    """The choice for an operation by this CPU's table; None where it is the kernel in any case."""
    measured = _entries().get(operation, {})
    missed = amx_missed()
    others = EVERY if missed and operation.dtype == "bfloat16" else ()
    sizes = {size: _intervals(points) for size, points in measured.items()}
    telling = tuple((size, batches) for size, batches in sizes.items() if batches or others)
    programs = all(batches == EVERY for batches in sizes.values()) if sizes else others == EVERY
    text = f"by {path()}" if measured else f"until {COMMAND} has measured it: {missed}"
    choice = Choice(telling, others, programs, missed is not None, text)
    return None if choice.empty else choice


def batch_class(batch: int) -> int:
    """A number that is the same for two batches where no choice tells them apart."""
    return bisect.bisect_left(_breaks(), batch)


@functools.cache
def amx_missed() -> str | None:
    """Why bfloat16 is left to PyTorch until it is measured; None where it is not."""
    return None if backends.why_unavailable("cpp") else backends.amx_refusal()


def forget() -> None:
    """Ask the CPU and read the table anew; modules that have packed their weights keep what they were told."""
    for cached in (amx_missed, _entries, _breaks):
        cached.cache_clear()


# --- the table --------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the table is: $REPAVIT_TUNED, else the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("REPAVIT_TUNED") or Path(cache, "repavit_ops"))


def path(within: Path | None = None) -> Path:
    """The file of this CPU and level."""
    name = re.sub(r"[^a-z0-9]+", "_", f"cpu {backends.cpu_model()} {backends.cpu_level()}".lower()).strip("_")
    return (within or folder()) / f"{name}.json"


def here() -> dict[str, str]:
    """What a table must have been measured with to be followed."""
    return {
        "cpu": backends.cpu_model(),
        "level": backends.cpu_level(),
        "repavit_ops": __version__,
        "torch": str(torch.__version__),
    }


class Stale(Exception):
    """A table of another CPU or of other versions; says which."""


def read(file: Path) -> list[Measured]:
    """What a table says.

    Raises:
        FileNotFoundError: there is none.
        Stale: it was measured with something else.
        ValueError: it cannot be read, or is no table; says what to do.
    """
    try:
        table = json.loads(file.read_text())
        with_what = {name: str(table[name]) for name in here()}
        entries = [_measured(entry) for entry in table["entries"]]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{file} is no table of this library ({type(error).__name__}: {error}); delete it, {COMMAND} writes another"
        ) from error
    wrong = [f"{name} {with_what[name]}, not {value}" for name, value in here().items() if with_what[name] != value]
    if wrong:
        raise Stale(f"{file} was measured with {' and '.join(wrong)}")
    return entries


def add(measured: Measured, file: Path) -> None:
    """Add or replace one entry; a table of other versions is begun anew.

    The file is replaced whole, so that a reader never sees half of it.

    Raises:
        ValueError: what stands there is no table.
    """
    try:
        present = {_key(entry): entry for entry in read(file)}
    except (FileNotFoundError, Stale):
        present = {}
    present[_key(measured)] = measured
    lines = ",\n".join("  " + json.dumps(_entry(present[key])) for key in sorted(present, key=repr))
    header = json.dumps({**here(), "date": datetime.date.today().isoformat()})
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(f'{header[:-1]}, "entries": [\n{lines}\n]}}\n')
    temporary.replace(file)


def state() -> str:
    """How this CPU's table stands, in one line."""
    try:
        entries = read(path())
    except FileNotFoundError:
        others = f"; {len(found)} of other CPUs or levels" if (found := list(folder().glob("cpu_*.json"))) else ""
        return f"none ({path()}){others}: {COMMAND} measures"
    except Stale as stale:
        return f"not used: {stale}; {COMMAND} measures anew"
    except ValueError as error:
        return f"not used: {error}"
    threads = sorted({entry.operation.threads for entry in entries})
    chosen = sum(entry.choice == "pytorch" for entry in entries)
    own = "" if torch.get_num_threads() in threads else f", none of which has the {torch.get_num_threads()} of now"
    counts = ", ".join(map(str, threads))
    return f"{path()}: {len(entries)} measured on {counts} threads{own}; PyTorch's own form for {chosen}"


@functools.cache
def _entries() -> dict[Operation, dict[tuple[int, ...], dict[int, bool]]]:
    """Of the table that holds here: operation → size → batch → whether PyTorch's form is taken."""
    table: dict[Operation, dict[tuple[int, ...], dict[int, bool]]] = {}
    try:
        entries = read(path()) if backends.why_unavailable("cpp") is None else []
    except (FileNotFoundError, Stale):  # info and fusion_report say so
        return table
    except ValueError as error:
        warnings.warn(f"repavit_ops: the CPU's table is not used: {error}", RuntimeWarning, stacklevel=2)
        return table
    for entry in entries:
        table.setdefault(entry.operation, {}).setdefault(entry.size, {})[entry.batch] = entry.choice == "pytorch"
    return table


@functools.cache
def _breaks() -> list[float]:
    """All batches at which some choice changes."""
    every = (_intervals(points) for sizes in _entries().values() for points in sizes.values())
    return sorted({edge for batches in every for interval in batches for edge in interval})


def _intervals(points: Mapping[int, bool]) -> Batches:
    """The batches whose nearest measured one, by ratio, is PyTorch's."""
    batches = sorted(points)
    edges = [0.0, *(math.sqrt(a * b) for a, b in itertools.pairwise(batches)), math.inf]
    found: list[tuple[float, float]] = []
    for batch, low, high in zip(batches, edges[:-1], edges[1:], strict=True):
        if not points[batch]:
            continue
        if found and found[-1][1] == low:
            found[-1] = (found[-1][0], high)
        else:
            found.append((low, high))
    return tuple(found)


def _key(measured: Measured) -> tuple[Operation, tuple[int, ...], int]:
    return measured.operation, measured.size, measured.batch


def _entry(measured: Measured) -> dict[str, Any]:
    entry = asdict(measured)
    return {**entry.pop("operation"), **entry, "us": measured.us if math.isfinite(measured.us) else None}


def _measured(entry: Mapping[str, Any]) -> Measured:
    operation = Operation(*(kind(entry[name]) for name, kind in _FIELDS.items()))
    size, batch, choice = tuple(map(int, entry["size"])), int(entry["batch"]), entry["choice"]
    if batch < 1 or choice not in CHOICES:
        raise ValueError(f"got batch {batch} and choice {choice!r}, wanted at least 1 and one of {', '.join(CHOICES)}")
    us = math.inf if entry["us"] is None else float(entry["us"])
    return Measured(operation, size, batch, us, float(entry["pytorch_us"]), choice)


_FIELDS = {"operator": str, "dtype": str, "weights": str, "form": str, "threads": int}  # of an Operation


def _range(batches: Batches) -> str:
    """Intervals in whole numbers: "batch 1 to 2, from 6 on"."""
    if batches == EVERY:
        return "every batch"
    spans = [(math.floor(low) + 1, math.inf if math.isinf(high) else math.floor(high)) for low, high in batches]
    texts = (f"{low}" if low == high else f"{low} to {high}" for low, high in spans if not math.isinf(high))
    return "batch " + ", ".join([*texts, *(f"from {low} on" for low, high in spans if math.isinf(high))])


def _times(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _told(name: str, value: Any) -> str:
    """An argument as an operation tells it; of numbers such as eps only that they are there."""
    if value is None or value is False or name == "scale":
        return ""
    if value is True or isinstance(value, float):
        return name
    return f"{name} {_times(value)}" if isinstance(value, tuple | list) else f"{name} {value}"
