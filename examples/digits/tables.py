"""Tables of what is in ``results/``, as Markdown: ``python examples/digits/tables.py``, ``--readme`` to put them there.

A cell is the mean over the seeds ± their standard deviation (n - 1 below the root). Differences are taken seed by seed:
a seed fixes the held-out images and the initial weights, so runs of one seed compare like with like.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables.py writes from here", "<!-- to here -->"

DEPTHS = ("vanilla 12", "joined 6", "joined 4", "joined 3", "vanilla 6", "vanilla 4", "vanilla 3")
RATIOS = tuple(f"θ {ratio:.2f}" for ratio in (0.0, 0.25, 0.5, 0.75, 1.0))
ABLATION = ("θ 0.75", "deployed shape, one BatchNorm", "deployed shape, no norm")
TITLES = {
    "depth": ("Depth: 12 blocks, and 6, 4 or 3 trained as joined branches or alone", DEPTHS),
    "θ": ("Idle ratio θ of 12 blocks (the shape of RePaViT's Table 4)", RATIOS),
    "ablation": ("Train in full and merge, or train in the deployed shape (RePaViT's Table 5), θ = 0.75", ABLATION),
}

Row = dict[str, Any]


def read(results: Path) -> dict[str, list[Row]]:
    """Rows of every task."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(results.glob("*.jsonl"))
    }


def spread(values: Iterable[float], unit: float = 100.0) -> str:
    """Mean ± standard deviation, in percent."""
    values = [unit * value for value in values]
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{round(statistics.mean(values), 1) + 0.0:.1f} ± {deviation:.1f}"  # + 0.0: no -0.0


def table(rows: list[Row], names: tuple[str, ...]) -> list[str]:
    """One line per configuration; differences to the first of them."""
    accuracy = {name: {r["seed"]: r["accuracy_merged"] for r in rows if r["configuration"] == name} for name in names}
    base = accuracy[names[0]]
    lines = [
        f"| | seeds | accuracy, % | against {names[0]}, points | MParams trained → merged | MMACs merged |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        seeds = accuracy[name]
        if not seeds:
            continue
        row = next(r for r in rows if r["configuration"] == name)
        against = [seeds[seed] - base[seed] for seed in seeds if seed in base]
        difference = "" if name == names[0] or not against else spread(against)
        params = " → ".join(f"{count / 1e6:.3f}" for count in dict.fromkeys(row["params"]))
        cells = (name, str(len(seeds)), spread(seeds.values()), difference, params, f"{row['macs'][1] / 1e6:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def document(results: Path) -> str:
    """Every table of every task, and what merging changed."""
    parts = []
    for task, rows in read(results).items():
        parts.append(f"### {task}")
        for title, names in TITLES.values():
            parts += [f"**{title}**", "\n".join(table(rows, names))]
        changed = sum(row["predictions_changed"] for row in rows)
        parts.append(f"Predictions that merging changed, in all {len(rows)} runs together: {changed}.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", action="store_true", help="write the tables into README.md beside this file")
    options = parser.parse_args()
    tables = document(options.results)
    if not options.readme:
        print(tables)
        return
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    marker, _, rest = rest.partition("\n")
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}{marker}\n\n{tables}\n\n{END}{after}")


if __name__ == "__main__":
    main()
