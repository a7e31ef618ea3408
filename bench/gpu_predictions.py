"""What the GPU day should show, computed before it: ``python bench/gpu_predictions.py [--results FILE] [--into PAGE]``.

For every headline row, and FFNs alone: launches, FLOP and bytes of each provider (gpu_ledger.py) and the time that they
take by the ceilings of a GPU. With results, the time measured stands beside it. ``--into`` renews docs/gpu.md's tables.

    time of a launch = NODE + max(FLOP / rate, bytes / bandwidth)

A product runs at ``PRODUCT`` of the measured ceiling, on tiles of which a last wave may fill the processors badly;
attention at ``ATTENTION``. Both sides of every ratio get the same numbers: it comes from bytes, launches and waves.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_ledger
import torch
from gpu_cases import FFN_CHANNELS, addmm_ffn, ffn_case, meta_ffn
from gpu_ledger import Launch, Ledger
from gpu_models import BF16, HEADLINE, HEADLINE_BATCHES, on_meta
from torch import nn

from repavit_ops import reference
from repavit_ops.kernels.chips import KNOWN, Chip

PRODUCT, ATTENTION = 0.75, 0.4  # share of the ceiling: cuBLAS at these sizes; attention kernels at 197 tokens
NODE = 1.5e-6  # seconds from one kernel of a graph to the next, where nothing was measured
TILES = ((128, 128), (64, 64))  # large where they fill the processors
FAR_OFF = 1.3  # a row that is off by more is to be explained
PROVIDERS = {  # name in the results → form of the model, whether compiled
    "repavit_ops": ("fused", False),
    "merged_eager": ("merged", False),
    "merged_compile": ("merged", True),
    "vanilla_fused": ("vanilla_fused", False),
    "vanilla_eager": ("vanilla", False),
    "vanilla_compile": ("vanilla", True),
}
BEGIN, END = "<!-- predictions: {} -->", "<!-- end of predictions -->"


@dataclass(frozen=True)
class Ceiling:
    """What a GPU can do at most: product in FLOP/s, copy in bytes/s, seconds per node of a graph."""

    product: float
    copy: float
    node: float = NODE


CEILINGS = {"H100": Ceiling(798e12, 3.0e12), "H200": Ceiling(790e12, 4.3e12)}  # measured on such machines, but the node


def seconds(launch: Launch, ceiling: Ceiling, chip: Chip) -> float:
    if launch.product:
        rate = ceiling.product * PRODUCT * _filled(*launch.product, chip.processors)
    else:
        rate = ceiling.product * ATTENTION
    return ceiling.node + max(launch.flop / rate, launch.bytes / ceiling.copy)


def _filled(rows: int, columns: int, processors: int) -> float:
    """Share of the processors at work, all waves together; of a few large or many small tiles what is better."""

    def filled(tile: tuple[int, int]) -> float:
        tiles = math.ceil(rows / tile[0]) * math.ceil(columns / tile[1])
        return tiles / (math.ceil(tiles / processors) * processors)

    return max(filled(tile) for tile in TILES)


def ledger_of(name: str, batch: int, provider: str, chip: Chip) -> Ledger:
    form, is_compiled = PROVIDERS[provider]
    ledger = _recorded(name, batch, form, chip)
    return gpu_ledger.compiled(ledger) if is_compiled else ledger


@functools.cache
def _recorded(name: str, batch: int, form: str, chip: Chip) -> Ledger:
    model = _model(name, form)
    images = torch.empty(batch, 3, 224, 224, dtype=BF16, device="meta")
    return gpu_ledger.record(lambda: model(images), chip)


@functools.cache
def _model(name: str, form: str) -> nn.Module:
    return on_meta(name, form, 1)[0]


@dataclass(frozen=True)
class Prediction:
    """One provider of one row."""

    case: str
    provider: str
    launches: int
    flop: float
    bytes: float
    microseconds: float


def predictions(ceiling: Ceiling, chip: Chip = KNOWN["sm_90"]) -> Iterator[Prediction]:
    for batch in HEADLINE_BATCHES:
        for name in HEADLINE:
            for provider in PROVIDERS:
                ledger = ledger_of(name, batch, provider, chip)
                yield prediction(f"{name} batch {batch}", provider, ledger, ceiling, chip)
    for c in FFN_CHANNELS:
        calls = {"repavit_ops": ffn_case(c, 128).meta}
        for provider, function in (("eager", reference.partial_gelu_ffn), ("addmm", addmm_ffn)):
            calls[provider] = functools.partial(function, *meta_ffn(c, 128))
        for provider, call in calls.items():
            yield prediction(f"ffn C{c} batch 128", provider, gpu_ledger.record(call, chip), ceiling, chip)


def prediction(case: str, provider: str, ledger: Ledger, ceiling: Ceiling, chip: Chip) -> Prediction:
    launches = ledger.launches
    return Prediction(
        case,
        provider,
        len(launches),
        sum(launch.flop for launch in launches),
        sum(launch.bytes for launch in launches),
        1e6 * sum(seconds(launch, ceiling, chip) for launch in launches),
    )


def measured(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(case, of models "MODEL batch B", provider) → median µs, of the row that has it."""
    found = {}
    for row in rows:
        if row["part"] in ("models", "ops") and "seconds" in row:
            case = " ".join(row["case"].split()[:3]) if row["part"] == "models" else row["case"]
            for provider, times in row["seconds"].items():
                found.setdefault((case, provider), 1e6 * times[1])
    return found


def table(ceiling: Ceiling, results: dict[tuple[str, str], float]) -> str:
    """Markdown: a line for every provider of every headline row."""
    lines = [
        "| row | provider | launches | GFLOP | MB | predicted µs | predicted: times ours | measured µs |"
        " measured: times ours | off |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ours = 0.0
    for p in predictions(ceiling):
        ours = p.microseconds if p.provider == "repavit_ops" else ours
        time, own = results.get((p.case, p.provider)), results.get((p.case, "repavit_ops"))
        off = "" if time is None else f"{time / p.microseconds:.2f}"
        if time is not None and not 1 / FAR_OFF <= time / p.microseconds <= FAR_OFF:
            off += " **open**"
        lines.append(
            f"| {p.case} | {p.provider} | {p.launches} | {p.flop / 1e9:.0f} | {p.bytes / 1e6:.0f} | "
            f"{p.microseconds:.0f} | {p.microseconds / ours:.2f} | {'' if time is None else f'{time:.0f}'} | "
            f"{f'{time / own:.2f}' if time and own else ''} | {off} |"
        )
    return "\n".join(lines)


def renewed(page: str, gpu: str, text: str) -> str:
    """``page`` with the table of one GPU in place of the one that it holds between its marks."""
    begin = BEGIN.format(gpu)
    pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(END), re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"no {begin} in the page")
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{END}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=CEILINGS, action="append", help="default: all")
    parser.add_argument("--results", type=Path, help="JSON lines of bench/gpu.py on that one GPU; its ceilings count")
    parser.add_argument("--into", type=Path, help="page whose tables are renewed")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results else []
    for gpu in options.gpu or CEILINGS:
        ceiling, found = CEILINGS[gpu], measured(rows) if gpu in str(rows[:1]) else {}
        for row in rows if found else ():
            if row["part"] == "ceilings":
                ceiling = Ceiling(row["product_flops"], row["copy_bytes_per_second"], row["node_seconds"])
        text = table(ceiling, found)
        if options.into:
            options.into.write_text(renewed(options.into.read_text(), gpu, text))
        else:
            print(f"{gpu}\n{text}\n")


if __name__ == "__main__":
    main()
