"""The JSON lines of bench/results as tables of docs/ and examples/:  python bench/bench_tables.py [--write]

Takes the files that each page names (a name or a pattern, in order of their dates), each table between its own marks;
without ``--write`` it prints what would change.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from pathlib import Path
from typing import Any

import cited_tables

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- bench_tables (\w+) (\S+) begin -->\n).*?(<!-- bench_tables end -->)", re.DOTALL)
TITLES = {
    **{"eager": "eager", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "litert": "LiteRT"},
    **{"executorch": "ExecuTorch", "ncnn": "ncnn", "iree": "IREE", "zentorch": "zentorch", "compile": "torch.compile"},
}
TABLE_NAMES = {"depth": "Depth of ViT-Tiny"}

Row = dict[str, Any]


def read(files: str) -> list[Row]:
    """The rows of a file, or of all that match a pattern."""
    paths = sorted(ROOT.glob(files))
    if not paths:
        raise FileNotFoundError(f"bench_tables: no file is called {files}")
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def pages() -> list[Path]:
    """The pages that have such a table."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
    return [page for page in every if PLACE.search(page.read_text())]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; columns of numbers to the right, the first and those of words alone to the left."""
    numbers = [any(character.isdigit() for cells in rows for character in cells[at]) for at in range(1, len(head))]
    lines = [head, ["---", *("---:" if right else "---" for right in numbers)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def beside_peers(rows: list[Row]) -> str:
    """Our time, and how many times that each peer's is; the last row of a case that has a peer counts."""
    merged: dict[tuple[str, str], Row] = {}
    for row in rows:
        known = merged.setdefault((row["case"], row["dtype"]), {"ratios": {}})
        merged[row["case"], row["dtype"]] = {**row, "ratios": {**known["ratios"], **row["ratios"]}}
    peers = [name for name in TITLES if any(name in row["ratios"] for row in merged.values())]
    lines = [
        [
            row["case"] if row["dtype"] == "float32" else f"{row['case']}, {row['dtype']}",
            *_ours(row),
            *(f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in peers),
        ]
        for row in merged.values()
    ]
    return table(["", "ms", "spread", "GFLOP/s", *(TITLES[name] for name in peers)], lines)


def _ours(row: Row) -> list[str]:
    low, middle, high = row["seconds"]["repavit_ops"]
    return [f"{1e3 * middle:.3g}", f"{100 * (high - low) / middle:.0f} %", f"{row['gflops']:.0f}"]


def method(rows: list[Row]) -> str:
    """The papers' tables, one below the other."""
    head = ["", "M params", "GMACs", "plain", "ratio", "fused", "ratio", "paper's ratio"]
    parts = []
    for name in dict.fromkeys(row["table"] for row in rows):
        lines = []
        for row in rows:
            if row["table"] == name:
                label = f"{row['label']}, training form" if row["form"] == "training" else row["label"]
                lines.append([label, _millions(row, "params", "mparams"), _billions(row), *_speeds(row)])
        parts.append(f"**{TABLE_NAMES.get(name, f'Table {name}')}**\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def _millions(row: Row, key: str, printed: str) -> str:
    return f"{row[key] / 1e6:.1f}" if key in row else _number(row["paper"][printed], 1)


def _billions(row: Row) -> str:
    return f"{row['macs'] / 1e9:.1f}" if "macs" in row else _number(row["paper"]["gmacs"], 1)


def _speeds(row: Row) -> list[str]:
    cells = []
    for kind in ("plain", "fused"):
        cells += [_number(row["images_per_second"].get(kind), 1), _number(row["ratios"].get(kind), 2)]
    return [*cells, _number(row["paper_ratio"], 2)]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def made(kind: str, rows: list[Row]) -> str:
    """A table of some kind, as Markdown."""
    if kind in cited_tables.KINDS:
        head, *lines = cited_tables.KINDS[kind](rows)
        return table(head, lines)
    return KINDS[kind](rows)


KINDS = {"models": beside_peers, "ops": beside_peers, "method": method}


def filled(page: str) -> str:
    """The page with every table made anew from the file that it names."""
    return PLACE.sub(lambda found: f"{found[1]}{made(found[2], read(found[3]))}\n{found[4]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    arguments = parser.parse_args()
    for page in pages():
        before = page.read_text()
        after = filled(before)
        if arguments.write:
            page.write_text(after)
        else:
            print(
                *difflib.unified_diff(before.splitlines(), after.splitlines(), page.name, page.name, lineterm=""),
                sep="\n",
            )


if __name__ == "__main__":
    main()
