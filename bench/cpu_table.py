"""The rows of bench/bench_models.py for people: ``python bench/cpu_table.py bench/results/FILE.jsonl …`` (Markdown).

Of a case that was measured more than once the last row counts; of a peer that it left out, the last row that has it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

CASE = re.compile(r"(?P<family>\w+) (?P<weights>merged|vanilla) batch (?P<batch>\d+)")
COLUMNS = {
    "float32": ("openvino", "onnxruntime", "compile", "eager"),
    "bfloat16": ("openvino", "compile", "eager", "eager float32"),
}
TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "compile": "torch.compile", "eager": "eager"}

Row = dict[str, Any]


def read(paths: list[Path]) -> dict[tuple[str, str], Row]:
    """By case and dtype: images per second and the ratios to every peer that was ever measured beside it."""
    rows: dict[tuple[str, str], Row] = {}
    for line in "".join(path.read_text() for path in paths).splitlines():
        row = json.loads(line)
        if CASE.fullmatch(row["case"]) is None:
            continue
        known = rows.setdefault((row["case"], row["dtype"]), {"ratios": {}})
        known["images"] = row["images_per_second"]["repavit_ops"]
        known["ratios"] |= row["ratios"]
    return rows


def _parts(case: str) -> tuple[str, str, int]:
    match = CASE.fullmatch(case)
    assert match is not None
    return match["family"], match["weights"], int(match["batch"])


def markdown(rows: dict[tuple[str, str], Row]) -> str:
    """One line per model, weights and batch: our images per second and how many times each peer's that is."""
    head, line = ["model", "weights", "batch"], ["---"] * 3
    for dtype, peers in COLUMNS.items():
        head += [f"{dtype}: images/s", *(TITLES.get(peer, peer) for peer in peers)]
        line += ["---:"] * (1 + len(peers))
    lines = [head, line]
    for family, weights, batch in sorted({_parts(case) for case, _ in rows}):
        case, cells = f"{family} {weights} batch {batch}", [family, weights, str(batch)]
        for dtype, peers in COLUMNS.items():
            row = rows.get((case, dtype), {"ratios": {}})
            cells.append(f"{row['images']:.1f}" if "images" in row else "")
            cells += [f"{row['ratios'][peer]:.2f}" if peer in row["ratios"] else "" for peer in peers]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="of bench/results")
    print(markdown(read(parser.parse_args().files)))
