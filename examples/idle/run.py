"""The protocol of protocol.json on DINOv2 ViT-S/14: block by block, distilled, speed; one JSON per split and θ.

    pip install '.[pretrained]' scikit-image scikit-learn matplotlib
    python examples/idle/photos.py fetch FOLDER
    python examples/idle/run.py --extras FOLDER                    # block by block: 3 splits x 3 ratios
    python examples/idle/run.py --extras FOLDER --distill          # block by block again, on other crops, after it
    python examples/idle/run.py --speed                            # images/s of the original and of every ratio
    python examples/idle/run.py --table                            # mean ± spread over the splits, from the files

What is there already is not computed again; models go to --models, which distillation starts from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import photos
import torch
from torch import nn

import repavit_ops
from repavit_ops.idling import fidelity, speed
from repavit_ops.idling.blocks import open_blocks
from repavit_ops.idling.solving import deployed
from repavit_ops.idling.solving import original as as_solution
from repavit_ops.models import load_dinov2_small

RESULTS = Path(__file__).with_name("results")
RATIOS = (0.25, 0.5, 0.75)
BATCH = 48  # large: the Gram products are quicker
TARGETS = {"block by block": (0.985, 0.955, 0.90), "distilled": (0.99, 0.975, 0.94)}  # patches at each ratio


def block_by_block(split: int, ratio: float, extras: Path, models: Path) -> None:
    """Idle the model on a split's calibration crops; write the file and what its test crops say."""
    original = load_dinov2_small(img_size=photos.PROTOCOL["resolution"])
    crops = photos.calibration_crops(split, extras)
    started = time.process_time()
    idled = repavit_ops.idle_pretrained(
        original,
        crops.split(BATCH),
        ratio,
        allocate=photos.PROTOCOL["allocate"],
        steps=photos.PROTOCOL["steps"],
        tokens_per_image=photos.PROTOCOL["tokens_per_image"],
        seed=photos.PROTOCOL["seed"],
    )
    seconds = time.process_time() - started
    repavit_ops.save_checkpoint(idled, models / f"{split}_{ratio}.safetensors")
    report: Any = idled.idle_report
    fits = [dataclasses.asdict(block) for block in report]
    record(split, ratio, "block by block", original, idled, cpu_seconds=seconds, crops=len(crops), fits=fits)


def distilled(split: int, ratio: float, extras: Path, models: Path) -> None:
    """Distill a split's idled model on other crops of its calibration photos."""
    original = load_dinov2_small(img_size=photos.PROTOCOL["resolution"])
    idled = repavit_ops.load_checkpoint(models / f"{split}_{ratio}.safetensors")
    recipe = photos.PROTOCOL["distillation"]
    started = time.process_time()
    crops = photos.distillation_crops(split, extras)
    left = repavit_ops.distill_blocks(
        idled, original, crops.split(BATCH), steps=recipe["steps"], lr=recipe["lr"], seed=photos.PROTOCOL["seed"]
    )
    seconds = time.process_time() - started
    repavit_ops.save_checkpoint(idled, models / f"{split}_{ratio}.distilled.safetensors")
    record(
        split,
        ratio,
        "distilled",
        original,
        idled,
        cpu_seconds=seconds,
        crops=len(crops),
        unexplained=list(left.values()),
    )


def record(split: int, ratio: float, stage: str, original: nn.Module, idled: nn.Module, **facts: Any) -> None:
    kept = fidelity(original, idled, photos.test_crops(split).split(BATCH))
    result = {"split": split, "idle_ratio": ratio, "stage": stage, **kept.to_dict(), **facts}
    RESULTS.mkdir(exist_ok=True)
    file(split, ratio, stage).write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"split {split} θ {ratio} {stage}: patches {kept.patches:.4f}, class token {kept.class_token:.4f}", flush=True
    )


def file(split: int, ratio: float, stage: str) -> Path:
    return RESULTS / f"split{split}_idle{ratio}_{stage.replace(' ', '_')}.json"


def measure_speed(batch: int = 8) -> None:
    """Images per second, fused, of the original and of each ratio: the shapes decide, not the weights."""
    original = load_dinov2_small(img_size=photos.PROTOCOL["resolution"])
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rates = {}
    for ratio in RATIOS:
        shaped, sites = open_blocks(original)
        for site in sites:  # the original's own weights: nothing is fitted
            m = repavit_ops.reparam.active_channels(site.hidden, ratio)
            first = torch.cat((torch.arange(m), torch.arange(site.hidden, site.hidden + site.ffn.dim + 1)))
            site.block.mlp = deployed(site.ffn, torch.arange(m), as_solution(site.ffn)[first])
        rates[ratio] = speed(original, shaped, images).to_dict()
    RESULTS.mkdir(exist_ok=True)
    facts = {"isa": repavit_ops.fusion_report(repavit_ops.fuse(original)).runs_on, "rates": rates}
    (RESULTS / "speed.json").write_text(json.dumps(facts, indent=1) + "\n")


def table() -> str:
    """The README's table, from the files."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("split*.json"))]
    rates = json.loads((RESULTS / "speed.json").read_text())["rates"] if (RESULTS / "speed.json").exists() else {}
    lines = [
        "| θ | stage | crops | patches, mean ± spread | target | class token | splits | images/s, original → result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for index, ratio in enumerate(RATIOS):
        for stage, targets in TARGETS.items():
            runs = [run for run in found if run["idle_ratio"] == ratio and run["stage"] == stage]
            if runs:
                patches, token = (_spread([run[key] for run in runs]) for key in ("patches", "class_token"))
                pace = rates.get(str(ratio))
                fast = "" if pace is None else f"{pace['original']:.1f} → {pace['idled']:.1f} ({pace['gain']:.2f}x)"
                crops = ", ".join(sorted({str(run["crops"]) for run in runs}))
                cells = (ratio, stage, crops, patches, targets[index], token, len(runs), fast)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", type=Path, help="folder of photos.py fetch")
    parser.add_argument("--models", type=Path, default=Path("idled_models"), help="folder for weights")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--idle-ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--distill", action="store_true", help="distill what that left")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.speed:
        measure_speed()
    if options.extras is not None:
        options.models.mkdir(exist_ok=True, parents=True)
        for split in options.splits:
            for ratio in options.idle_ratios:
                if not file(split, ratio, "block by block").exists():
                    block_by_block(split, ratio, options.extras, options.models)
                if options.distill and not file(split, ratio, "distilled").exists():
                    distilled(split, ratio, options.extras, options.models)
    if options.table or options.speed:
        print(table())


if __name__ == "__main__":
    main()
