"""Has anything become slower?  ``python bench/compare.py OLD.jsonl NEW.jsonl``: two files of results, case by case.

A case is judged by its ratio to eager, measured in the same run: what the machine did meanwhile met both. The spread of
a ratio is that of its two times, ``hypot(h_ours, h_eager)`` with h = (p80 - p20) / 2 p50; of several rows of one case
the median ratio counts, and half the distance of the outermost joins the spread. A case is

    slower      the new ratio is below the old one by more than both spreads together, and by more than --least
    faster      the same upwards
    no verdict  it did not move that far, and the spreads together exceed --tell: a loss of that size would not show

Exit status: 1 where a case is slower, 2 where nothing can be compared. Rows of another processor, instruction set,
number of threads or torch are left out: their eager is another one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "repavit_ops"
MACHINE = ("cpu", "isa", "threads", "torch")
FAILED, USAGE = 1, 2

Key = tuple[Any, ...]  # of a case: machine, case, dtype


@dataclass(frozen=True)
class Measured:
    """How many times the peer's speed ours is, and the share of that by which a run may miss it."""

    ratio: float
    spread: float

    @classmethod
    def of(cls, rows: list[dict[str, list[float]]], peer: str) -> Measured:
        """Of the rows of one case: provider → 20th, 50th, 80th percentile in seconds."""
        ratios = [row[peer][1] / row[OURS][1] for row in rows]
        middle = statistics.median(ratios)
        within = statistics.median(math.hypot(_half(row[OURS]), _half(row[peer])) for row in rows)
        return cls(middle, within + (max(ratios) - min(ratios)) / (2 * middle))


@dataclass(frozen=True)
class Change:
    """One case in both files."""

    case: str
    dtype: str
    old: Measured
    new: Measured
    verdict: str

    @property
    def change(self) -> float:
        """The new ratio over the old one."""
        return self.new.ratio / self.old.ratio


def _half(percentiles: list[float]) -> float:
    low, middle, high = percentiles
    return (high - low) / (2 * middle)


def read(path: Path, peer: str) -> dict[Key, list[dict[str, list[float]]]]:
    """The times of every case of a file that has both ours and the peer's, with their percentiles.

    Raises:
        ValueError: a line is no result; names file and line.
    """
    found: dict[Key, list[dict[str, list[float]]]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            seconds = row["seconds"]
            key = (*(row[name] for name in MACHINE), row["case"], row["dtype"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number}: is no row of results ({reason})") from error
        if all(len(seconds.get(provider, ())) == 3 for provider in (OURS, peer)):
            found.setdefault(key, []).append(seconds)
    return found


def judge(old: Measured, new: Measured, least: float, tell: float) -> str:
    """The word for a change; see the top of this file."""
    moved, noise = math.log(new.ratio / old.ratio), math.log1p(old.spread + new.spread)
    if abs(moved) > max(noise, math.log1p(least)):
        return "faster" if moved > 0 else "slower"
    return "no verdict" if noise > math.log1p(tell) else "same"


def compare(old: Path, new: Path, peer: str, least: float, tell: float) -> list[Change]:
    """Every case that both files have on the same machine, largest loss first.

    Raises:
        ValueError: there is none; says what the files hold.
    """
    before, after = read(old, peer), read(new, peer)
    changes = []
    for key in before.keys() & after.keys():
        pair = Measured.of(before[key], peer), Measured.of(after[key], peer)
        changes.append(Change(key[-2], key[-1], *pair, judge(*pair, least, tell)))
    if not changes:
        raise ValueError(
            f"{old} and {new}: no case of both has {OURS} and {peer} on the same machine; the first was measured on "
            f"{_machines(before)}, the second on {_machines(after)}"
        )
    return sorted(changes, key=lambda row: row.change)


def _machines(keys: Iterable[Key]) -> str:
    kinds = {", ".join(f"{name} {value}" for name, value in zip(MACHINE, key, strict=False)) for key in keys}
    return " and ".join(sorted(kinds)) or "nothing"


def table(changes: list[Change], peer: str) -> str:
    """One line per case, and the count of each verdict."""
    width = max(len(f"{row.case} {row.dtype}") for row in changes)
    lines = [f"{'case':<{width}}  over {peer}: old        new        change"]
    for row in changes:
        old, new = (f"{of.ratio:5.2f} ±{of.spread:4.0%}" for of in (row.old, row.new))
        name = f"{row.case} {row.dtype}"
        lines.append(f"{name:<{width}}  {old:>18} {new:>11}  {row.change - 1:+7.1%}  {row.verdict}")
    counts = {word: sum(row.verdict == word for row in changes) for word in ("slower", "faster", "same", "no verdict")}
    mean = math.exp(statistics.mean(math.log(row.change) for row in changes))
    return "\n".join([*lines, "", f"{', '.join(f'{n} {word}' for word, n in counts.items())}; mean {mean - 1:+.1%}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--peer", default="eager", help="whose time in the same run is the measure")
    parser.add_argument("--least", type=float, default=0.03, help="smaller changes are none, as a share")
    parser.add_argument("--tell", type=float, default=0.15, help="loss that a case must be able to show, as a share")
    given = parser.parse_args(arguments)
    try:
        changes = compare(given.old, given.new, given.peer, given.least, given.tell)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return USAGE
    print(table(changes, given.peer))
    return FAILED if any(row.verdict == "slower" for row in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
