"""What of other libraries' models fuses: every row built, fused, compared, counted; the table of docs/coverage.md.

    python bench/coverage.py                    all rows at published widths, two blocks deep, into docs/coverage.md
    python bench/coverage.py --small "CLIP"     rows whose name holds CLIP, small, on screen
    python bench/coverage.py --write "CLIP"     these alone, at published widths, each in its place in docs/coverage.md

Norms and biases are random, since as initialised they hide what is folded wrongly. In float32 and bfloat16 the rule is
``max|fused - fp64| <= 2 max|eager in that dtype - fp64| + 1e-6``, over every tensor that the model returns.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import sys
import types
from pathlib import Path
from typing import NamedTuple

import torch
from coverage_models import Row, tensors_of
from coverage_more import ROWS
from torch import Tensor, nn

import repavit_ops
from repavit_ops.nn.given import cast_real

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs/coverage.md"
LIBRARIES = ("transformers", "torchvision", "open_clip_torch", "timm", "torch")
DTYPES = (torch.float32, torch.bfloat16)


class Outcome(NamedTuple):
    """What became of one row: sub-blocks fused and skipped, reasons, errors beside their bounds, calls in one."""

    fused: int
    skipped: int
    reasons: set[str]
    one_call: bool
    errors: dict[str, tuple[float, float]]

    @property
    def passed(self) -> bool:
        return all(error <= bound for error, bound in self.errors.values())


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of the size that keeps activations at theirs, norms around one, biases around zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1 and p.numel():
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        else:
            p.normal_(0, 0.2, generator=generator)
            if "head.conv" in name:
                p.add_(1.0)  # a ReLU behind them would leave zeros, whatever the model computes
            if "norm" in name.lower() or "ln_" in name or "lambda" in name:
                p.add_(float(name.endswith("weight") or "lambda" in name))
    return model.eval()


@torch.no_grad()
def outcome(row: Row, published: bool) -> Outcome:
    """Build, fuse and compare one row."""
    model = randomise(row.build(published))
    args, kwargs = row.inputs(published)
    exact = [t.double() for t in run(copy.deepcopy(model).double(), args, kwargs, torch.float64)]
    require_varied(exact)
    errors = {}
    for dtype in DTYPES:
        eager = run(cast_real(copy.deepcopy(model), dtype), args, kwargs, dtype)
        ours = run(repavit_ops.fuse(model, dtype=dtype), args, kwargs, dtype)
        assert len(eager) == len(ours) == len(exact), "the fused model returns another number of tensors"
        off = [max((b.double() - t).abs().max().item() for b, t in zip(of, exact, strict=True)) for of in (ours, eager)]
        errors[str(dtype).removeprefix("torch.")] = off[0], 2 * off[1] + 1e-6
    report = repavit_ops.fusion_report(repavit_ops.fuse(model))
    one_call = any(entry.status == "stacked" for entry in report.entries)
    return Outcome(len(report.fused), len(report.skipped), {e.note for e in report.skipped}, one_call, errors)


def require_varied(outputs: list[Tensor]) -> None:
    """Raise ValueError of outputs that no error of a fused model could show in: none at all, or all one number."""
    flat = [i for i, t in enumerate(outputs) if t.numel() > 1 and bool(t.min() == t.max())]
    if not outputs or flat:
        which = (
            f"tensor {flat[0]} of {len(outputs)} is {outputs[flat[0]].flatten()[0]:.3g} everywhere" if flat else "none"
        )
        raise ValueError(
            f"outputs: got {which}, wanted floating tensors of more than one value; change weights or inputs of the row"
        )


def run(model: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype) -> list[Tensor]:
    def cast(value):
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    torch.manual_seed(0)  # ViLT picks patches at random
    return tensors_of(model(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only rows whose name holds one of these")
    parser.add_argument("--small", action="store_true", help="small models, as the tests build them")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/coverage.md, whose others stay")
    options = parser.parse_args()
    if options.write and options.small:
        parser.error("--write: got --small too, wanted rows at published widths, as those of the page are")
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("stub"))  # fails beside torch for CPUs
    names = [n for n in ROWS if not options.words or any(w.lower() in n.lower() for w in options.words)]
    lines, failed = [], []
    for name in names:
        row = ROWS[name]
        try:
            result = outcome(row, not options.small)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        failed += [] if result.passed else [name]
        lines.append(line(name, row, result))
        print(lines[-1], flush=True)
    made = len(lines)
    if options.write:
        lines = [*rows_of(TARGET.read_text(), set(map(name_of, lines))), *lines]
        lines.sort(key=lambda row: list(ROWS).index(name_of(row)))
    if options.write or not (options.words or options.small):
        TARGET.write_text(page(lines))
    print("wrong:", ", ".join(failed)) if failed else print(f"{made} rows made, all equal")
    return 1 if failed else 0


def line(name: str, row: Row, result: Outcome) -> str:
    errors = " | ".join(f"{error:.1e} / {bound:.1e}" for error, bound in result.errors.values())
    calls = "one call" if result.one_call else "two calls a block" if result.fused else ""
    reasons = "; ".join(sorted(result.reasons))
    return f"| {row.library} | {name} | {result.fused} | {result.skipped} | {calls} | {errors} | {reasons} |"


def name_of(row: str) -> str:
    """The model of a line of the table."""
    return row.split(" | ")[1]


def rows_of(page: str, without: set[str]) -> list[str]:
    """The lines of a page's table, but those of models that are made anew or are no longer there."""
    rows = [
        row for row in page.splitlines() if row.startswith("| ") and " | " in row and not row.startswith("| library")
    ]
    return [row for row in rows if name_of(row) in ROWS and name_of(row) not in without]


def page(lines: list[str]) -> str:
    versions = []
    for library in LIBRARIES:
        try:
            versions.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"""# What fuses of other libraries' models

Made by `make coverage` ({", ".join(versions)}): models of the published widths, two blocks deep (Swin: two per stage),
random norms and biases. A whole block counts as two fused sub-blocks. Errors are max|fused - fp64| over every tensor
returned, beside their bound, 2 max|eager - fp64| + 1e-6. timm's families are in `tests/test_timm_models.py`.

Blocks without masks, hooks and gradients go through one call on a CPU, otherwise (and where "two calls a block" stands)
each half is one. Attention maps come only from unfused attention: load with `attn_implementation="eager"`, and the FFNs
alone fuse. A fused Swin of transformers keeps no state from call to call. `save_pretrained` of a fused model raises:
save before fusing.

| library | model | fused | skipped | | float32: error / bound | bfloat16: error / bound | why skipped |
|---|---|---|---|---|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
