"""Train every configuration on both tasks, merge it, write one JSON line per run: ``python examples/digits/run.py``.

A run that is in the results is not made again, so the command can be stopped and started at any time. It trains on one
thread. ``python examples/digits/tables.py`` makes tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from configurations import CONFIGURATIONS, DIM, TASKS, build

import repavit_ops
from repavit_ops.demo.training import ImageSet, Recipe, accuracy_of, predict, train
from repavit_ops.models import complexity

RESULTS = Path(__file__).parent / "results"


def one_run(task_name: str, name: str, seed: int, data: ImageSet, recipe: Recipe) -> dict[str, Any]:
    """Train, merge, compare."""
    task = TASKS[task_name]
    model = build(name, task, seed)
    began = time.process_time()
    course = train(model, data, recipe, seed)
    seconds = time.process_time() - began
    merged = repavit_ops.reparameterize(model)
    before, after = predict(model, data.test_images), predict(merged, data.test_images)
    sizes = complexity(model, task.image, in_chans=1), complexity(merged, task.image, in_chans=1)
    return {
        "task": task_name,
        "configuration": name,
        "seed": seed,
        "dim": DIM,
        "epochs": recipe.epochs,
        "loss": course[-1].loss,
        "accuracy": accuracy_of(before, data.test_labels),
        "accuracy_merged": accuracy_of(after, data.test_labels),
        "predictions_changed": int((before != after).sum()),
        "params": [size.params for size in sizes],
        "macs": [size.macs for size in sizes],
        "cpu_seconds": round(seconds, 1),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each configuration, from seed 0")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for task_name in options.tasks:
            path = options.out / f"{task_name}.jsonl"
            data = TASKS[task_name].load(seed)
            for name in CONFIGURATIONS:
                if (name, seed) in finished(path):
                    continue
                row = one_run(task_name, name, seed, data, TASKS[task_name].recipe)
                with path.open("a") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                print(f"{task_name}, {name}, seed {seed}: {row['accuracy']:.1%}, {row['cpu_seconds']} s", flush=True)


def finished(path: Path) -> set[tuple[str, int]]:
    """Runs that the file holds."""
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(row["configuration"], row["seed"]) for row in rows}


if __name__ == "__main__":
    main()
