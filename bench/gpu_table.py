"""The results of bench/gpu.py for people: what issue and design ask for, reached or missed, and every ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # one JSON line: part, case, seconds {provider: [p20, p50, p80]}, …
OURS = "repavit_ops"


def p50(row: Row, provider: str) -> float | None:
    times = row["seconds"].get(provider)
    return None if times is None else times[1]


def ratio(row: Row, *peers: str) -> float | None:
    """Time of the fastest of these peers over ours; None where one of the two is missing."""
    ours, theirs = p50(row, OURS), [t for peer in peers if (t := p50(row, peer)) is not None]
    return min(theirs) / ours if ours and theirs else None


@dataclass(frozen=True)
class Goal:
    """One number to reach: ``measure`` of the case's row (and the ceilings) ≥ ``wanted``."""

    text: str
    case: str
    wanted: float
    measure: Callable[[Row, Row], float | None]


def _against(*peers: str) -> Callable[[Row, Row], float | None]:
    return lambda row, ceilings: ratio(row, *peers)


def _share_of_product(row: Row, ceilings: Row) -> float | None:
    ours, peak = p50(row, OURS), ceilings.get("product_flops")
    return row["flop"] / ours / peak if ours and peak else None


GAINS = {  # the authors' speed-ups over vanilla
    **{"deit_tiny": 1.165, "deit_small": 1.23, "deit_base": 1.578, "vit_large": 1.668, "vit_huge": 1.687},
    **{"swin_tiny": 1.269, "swin_small": 1.331, "swin_base": 1.432},
}
WINDOWS = ("56x56x96", "28x28x192", "14x14x384", "7x7x768")  # of Swin-T's stages
MERGED = {"deit_tiny": 1.1, "deit_small": 1.1, "deit_base": 1.1, "swin_tiny": 1.3}


def _ffn(c: int, wanted: float) -> Goal:
    peers = _against("eager", "compile", "addmm")
    return Goal("FFN / best peer", f"ffn C{c} batch 128", wanted, peers)


def _fused(over: str, name: str, batch: int, wanted: float, *peers: str) -> Goal:
    return Goal(f"fused / {over} compiled", f"{name} batch {batch} {over} compiled", wanted, _against(*peers))


GOALS = (
    *(_ffn(c, 1.15) for c in (192, 384)),
    *(_ffn(c, 1.05) for c in (768, 1024, 1280)),
    *(Goal("FFN / product rate", f"ffn C{c} batch 128", 0.75, _share_of_product) for c in (1024, 1280)),
    Goal("attention / best SDPA", "attention 197x64 heads 12 batch 128", 1.2, _against("sdpa", "flash", "cudnn")),
    *(Goal("windows / SDPA with bias", f"windows {stage} batch 128", 2.0, _against("sdpa")) for stage in WINDOWS),
    *(_fused("merged", name, 128, wanted, "merged_compile") for name, wanted in MERGED.items()),
    Goal(
        "fused / merged max-autotune", "deit_small batch 128 merged max_autotune", 1.1, _against("merged_max_autotune")
    ),
    *(_fused("merged", name, 1, 1.3, "merged_compile") for name in ("deit_tiny", "deit_small")),
    *(_fused("vanilla", name, 128, gain, "vanilla_compile") for name, gain in GAINS.items()),
    *(
        Goal("fused / vanilla fused", f"{name} batch 128", gain, _against("vanilla_fused"))
        for name, gain in GAINS.items()
    ),
)


def verdicts(rows: Iterable[Row]) -> list[tuple[Goal, float | None]]:
    """Every goal with what was measured; None where it was not."""
    rows = list(rows)
    ceilings = next((row for row in reversed(rows) if row["part"] == "ceilings"), {})
    by_case = {row["case"]: row for row in rows if "seconds" in row}
    return [(goal, goal.measure(by_case[goal.case], ceilings) if goal.case in by_case else None) for goal in GOALS]


def missed(rows: Iterable[Row]) -> list[str]:
    """Cases below one of their goals, in the order of the goals."""
    return list(dict.fromkeys(goal.case for goal, value in verdicts(rows) if value is not None and value < goal.wanted))


def markdown(rows: list[Row]) -> str:
    """The whole report."""
    head = next((row for row in rows if "torch" in row), {})
    lines = [f"# {head.get('device', 'no results')}", ""]
    lines += [f"torch {head.get('torch')}, triton {head.get('triton')}, {head.get('date')}; bf16, medians.", ""]
    lines += _checks(rows) + _goals(rows)
    lines += _host(rows)
    for part, title in (("models", "Whole models"), ("ops", "Operators"), ("cpu", "The CPU")):
        lines += _cases(title, [row for row in rows if row["part"] == part and "seconds" in row])
    failed = [row for row in rows if "error" in row]
    lines += ["## Failed", ""] + [f"- {row['case']}: {row['error']}" for row in failed] if failed else []
    return "\n".join(lines) + "\n"


def _checks(rows: list[Row]) -> list[str]:
    """What is right or wrong, and what the machine can do."""
    lines = []
    for row in rows:
        if row["part"] == "first" and "right" in row:
            lines.append(f"- first {row['case']}: {'right' if row['right'] else 'WRONG: ' + row['why']}")
        if row["part"] == "check" and "passed" in row:
            cut = ", cut off" if row["cut"] else ""
            lines += [f"- {row['case']}: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped{cut}"]
            lines += [f"  - {failure['test']}" for failure in row["failures"]]
        if row["part"] == "ceilings" and "product_flops" in row:
            lines += [
                f"- bf16 product {row['product_flops'] / 1e12:.0f} TFLOP/s, copy "
                f"{row['copy_bytes_per_second'] / 1e12:.2f} TB/s, {row['node_seconds'] * 1e6:.2f} µs per graph node"
            ]
        if row["part"] == "ahead":
            lines += [f"- compiled ahead: {len(row['jobs'])} jobs"]
        if row["part"] == "run":
            lines += [f"- {row['case']}: {row['took']} s in all"]
    return [*lines, ""]


def _host(rows: list[Row]) -> list[str]:
    """µs that a call keeps the host busy, and per kernel that it launches."""
    lines = []
    for row in rows:
        if row["part"] == "host" and "seconds" in row:
            lines = ["## Host time, one image", "", "| call | µs | launches | µs per launch |", "|---|---|---|---|"]
            for provider, times in row["seconds"].items():
                count, microseconds = row["launches"].get(provider), 1e6 * times[1]
                each = f"{microseconds / count:.1f}" if count else ""
                lines.append(f"| {provider} | {microseconds:.1f} | {count or ''} | {each} |")
    return [*lines, ""]


def _goals(rows: list[Row]) -> list[str]:
    lines = ["## Must reach", "", "| what | case | wanted | measured | |", "|---|---|---|---|---|"]
    for goal, value in verdicts(rows):
        verdict = "not measured" if value is None else "pass" if value >= goal.wanted else "MISS"
        measured = "" if value is None else f"{value:.3f}"
        lines.append(f"| {goal.text} | {goal.case} | ≥ {goal.wanted:g} | {measured} | {verdict} |")
    return [*lines, ""]


def _cases(title: str, rows: list[Row]) -> list[str]:
    """Ours in µs with its rates, then each peer's time over ours."""
    if not rows:
        return []
    columns = "| case | ours µs (p20-p80) | TFLOP/s | GB/s | images/s | peer / ours |"
    lines = [f"## {title}", "", columns, "|---|---|---|---|---|---|"]
    for row in rows:
        low, middle, high = (1e6 * t for t in row["seconds"][OURS])
        rate = f"{row['flop'] / middle / 1e6:.0f}" if row.get("flop") else ""
        moved = f"{row['bytes'] / middle / 1e3:.0f}" if row.get("bytes") else ""
        images = f"{row['images'] / middle * 1e6:.0f}" if row.get("images") else ""
        peers = ", ".join(f"{name} {ratio(row, name):.2f}" for name in row["seconds"] if name != OURS)
        lines.append(f"| {row['case']} | {middle:.1f} ({low:.1f}-{high:.1f}) | {rate} | {moved} | {images} | {peers} |")
    return [*lines, ""]
