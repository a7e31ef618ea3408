"""Tables of docs/ that summarise rows of bench/results; bench_tables.py puts each between its marks."""

from __future__ import annotations

import re
import statistics
from typing import Any

Row = dict[str, Any]
Table = list[list[str]]

SHORT = {"deit_tiny": "DeiT-T", "deit_small": "DeiT-S", "deit_base": "DeiT-B", "swin_tiny": "Swin-T"}
INT8_PEERS = {
    "float32": "own float32",
    "bfloat16": "bfloat16",
    "onnxruntime dynamic": "ONNX Runtime dynamic",
    "onnxruntime static": "static",
    "openvino QDQ": "OpenVINO QDQ",
    "openvino NNCF": "OpenVINO on NNCF",
    "torchao": "torchao, compiled",
    "litert dynamic": "LiteRT dynamic",
    "executorch dynamic": "ExecuTorch dynamic",
}


def int8_speed(rows: list[Row]) -> Table:
    """int8's speed over each peer's; bold where the peer is faster."""
    models = _int8_models(rows)
    peers = [
        peer for peer in INT8_PEERS if peer != "bfloat16" and any(peer in row["ratios"] for row in models.values())
    ]
    lines = [[name, *(_over(row["ratios"].get(peer)) for peer in peers)] for name, row in models.items()]
    return [["int8 over", *(INT8_PEERS[peer] for peer in peers)], *lines]


def int8_cosines(rows: list[Row]) -> Table:
    """Each one's cosine with float64's logits."""
    models, peers = _int8_models(rows), list(INT8_PEERS)[1:6]
    lines = [[name, *(f"{row['cosines'][peer]:.5f}" for peer in ("int8", *peers))] for name, row in models.items()]
    return [["cosine of the logits", "int8", *(INT8_PEERS[peer] for peer in peers)], *lines]


def _int8_models(rows: list[Row]) -> dict[str, Row]:
    cases = ((re.fullmatch(r"(\w+) (merged|vanilla) int8 batch 1", row["case"]), row) for row in rows)
    return {f"{SHORT[found[1]]} {found[2]}": row for found, row in cases if found is not None}


def _over(ratio: float | None) -> str:
    if ratio is None:
        return "not timed"
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def gated_ffns(rows: list[Row]) -> Table:
    """Every run of a size; the share of the peak where the peak was the greater, as on a quiet machine."""
    lines = []
    for size, runs in _runs(rows, r"gated ffn C(\d+) m(\d+) batch (\d+)").items():
        shares = [(row["share_of_peak"], row["plain_share_of_peak"]) for row in runs]
        quiet = [pair for pair in shares if max(pair) <= 1]
        both = (", ".join(f"{100 * pair[index]:.0f} %" for pair in quiet) or "–" for index in (0, 1))
        lines.append([", ".join(size), ", ".join(f"{row['ratio']:.2f}" for row in runs), *both])
    return [["C, hidden, batch", "over the best of five peers", "share of peak", "plain"], *lines]


def turned_blocks(rows: list[Row]) -> Table:
    """Attention blocks with rotation and QK-norm, every run."""
    lines = []
    for size, runs in _runs(rows, r"turned block C(\d+) batch (\d+)").items():
        times = [f"{1 / row['ratios']['without both']:.2f}" for row in runs]
        lines.append([", ".join(size), ", ".join(times), ", ".join(f"{row['ratios']['eager']:.2f}" for row in runs)])
    return [["C, batch", "time over the block without both", "over eager"], *lines]


def _runs(rows: list[Row], pattern: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by what a pattern finds in their cases."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if (match := re.fullmatch(pattern, row["case"])) is not None:
            found.setdefault(match.groups(), []).append(row)
    return found


OPERATORS = {  # what is measured, beside what; cases, of which each group is a range of its own
    "FFN, 192 to 1280 channels, 1 and 8 images": (
        "the best of eager, torch.compile, oneDNN, ONNX Runtime, OpenVINO",
        (r"ffn C\d+ batch [18] mu \d",),
    ),
    "attention block, 192 / 384 / 768 channels": (
        "the best of the same",
        tuple(rf"block C{channels} batch [18]" for channels in (192, 384, 768)),
    ),
    "attention alone, 197 tokens, heads of 64 and 80": ("PyTorch's SDPA", (r"core 197x\d+ heads \d+ batch [18]",)),
    "Swin's windows alone, with bias and mask": (
        "PyTorch's SDPA, windows cut beforehand",
        (r"windows \d+x\d+x\d+ batch [18]",),
    ),
}


def operators(rows: list[Row]) -> Table:
    """Least and most of every size's ratio; of a size that was measured again the last row counts."""
    last = {(row["case"], row["dtype"]): row["ratio"] for row in rows}
    lines = []
    for name, (beside, groups) in OPERATORS.items():
        cells = []
        for dtype in ("float32", "bfloat16"):
            spans = [[r for (case, of), r in last.items() if of == dtype and re.fullmatch(g, case)] for g in groups]
            shown = " / ".join(f"{min(span):.2f}-{max(span):.2f}" for span in spans)
            mean = statistics.geometric_mean(spans[0])
            cells.append(shown if len(spans) > 1 else f"{shown}, mean {mean:.2f}")
        lines.append([name, beside, *cells])
    return [["", "beside", "float32", "bfloat16"], *lines]


def ray_actors(rows: list[Row]) -> Table:
    """Two processes and two Ray actors of one thread beside one process of two."""
    sources = {"pixels": "pixels (BMP)", "photos": "photos (JPEG)"}
    lines = []
    for row in (line for found in rows for line in found["rows"]):
        if row["source"] in sources and row["processes"] > 1:
            name = f"{sources[row['source']]}, two {'Ray actors' if row['ray'] else 'processes'}"
            numbers = [f"{row['images_per_s']:.1f}", f"{row['ratio']:.2f}", f"{row['rest_ms']:.0f} ms"]
            lines.append([name, *numbers])
    return [["", "images/s", "over one process of two threads", "of an image's 2 x 54 ms, the engine's"], *lines]


DENSE = {"retinanet": "RetinaNet", "mask_rcnn": "Mask R-CNN", "upernet": "UperNet"}


def dense(rows: list[Row]) -> Table:
    """Latencies of detectors and of a segmenter, whole and of the backbone's maps alone, to the vanilla model's."""
    found = {tuple(row["case"].split()): row["ms"] for row in rows}
    lines = []
    order = list(DENSE)
    for name, body in sorted(found, key=lambda case: (case[1] != "swin_small", order.index(case[0]))):
        ms = found[name, body]
        whole = [f"{ms[form] / ms['vanilla']:.2f}" for form in ("merged", "fused")]
        maps = [f"{ms[f'{form} maps'] / ms['vanilla maps']:.2f}" for form in ("merged", "fused")]
        size = body.removeprefix("swin_")[0].upper()
        lines.append([f"{DENSE[name]}, Swin-{size}", f"{ms['vanilla'] / 1e3:.1f}", *whole, *maps])
    return [["", "vanilla, s", "merged", "fused", "backbone: merged", "fused"], *lines]


KINDS = {
    "int8_speed": int8_speed,
    "int8_cosines": int8_cosines,
    "gated_ffns": gated_ffns,
    "turned_blocks": turned_blocks,
    "operators": operators,
    "ray_actors": ray_actors,
    "dense": dense,
}
