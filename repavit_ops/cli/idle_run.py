"""What ``repavit-ops idle`` does: a pretrained model in, a deployed file and a report out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints import load_checkpoint, save_checkpoint
from ..checkpoints.files import SUFFIXES, read_checkpoint
from ..checkpoints.idled_timm import save_idled
from ..idling import BlockResult, Fidelity, Speed, distill_blocks, fidelity, idle_pretrained, speed
from ..idling.folder import Crops, Preprocessing, photos_in
from ..models import Complexity, complexity, load_dinov2_small
from ..models.patch_embed import image_of

BUNDLED = "dinov2-small"


class Pretrained(NamedTuple):
    """A model and what its files and images need: timm's name and arguments (None: of this library), preprocessing."""

    model: nn.Module
    preprocessing: Preprocessing
    timm_name: str | None = None
    arguments: dict[str, Any] | None = None


class Outcome(NamedTuple):
    """Everything that the command reports.

    ``undistilled`` is the fidelity before distillation, None where there was none.
    """

    blocks: list[BlockResult]
    fidelity: Fidelity
    undistilled: Fidelity | None
    speed: Speed
    before: Complexity
    after: Complexity

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "blocks": [asdict(block) for block in self.blocks],
            "fidelity": self.fidelity.to_dict(),
            "undistilled": None if self.undistilled is None else self.undistilled.to_dict(),
            "images_per_second": self.speed.to_dict(),
            "params": [self.before.params, self.after.params],
            "macs": [self.before.macs, self.after.macs],
        }


def load(source: str, img_size: int | None) -> Pretrained:
    """The model that MODEL means: ``dinov2-small``, a checkpoint file, a timm name, or timm's NAME=FILE.

    Raises:
        ValueError: none of these. ImportError: what it needs is not installed. OSError: no weights are found.
    """
    if source == BUNDLED:
        size = (img_size or 224, img_size or 224)
        return Pretrained(load_dinov2_small(img_size=size), Preprocessing(size))
    name, _, weights = source.partition("=")
    if not weights and Path(source).suffix in SUFFIXES:
        loaded = load_checkpoint(source)
        return Pretrained(loaded, Preprocessing(_image_size(loaded, img_size)))
    try:
        import timm
    except ImportError:
        raise ImportError(f'{source}: models of timm need it: pip install "repavit-ops[timm]"') from None
    if not timm.is_model(name):
        raise ValueError(
            f"MODEL: got {source!r}, wanted {BUNDLED}, a file ending in {', '.join(SUFFIXES)}, a timm name or NAME=FILE"
        )
    arguments: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    state = read_checkpoint(weights).state if weights else None
    if state is not None and (head := state.get("head.weight")) is not None:
        arguments["num_classes"] = head.shape[0]
    model = timm.create_model(name, pretrained=state is None, **arguments).eval()
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{weights}: is no checkpoint of timm's {name}: {error}") from error
    config = timm.data.resolve_model_data_config(model)
    size = (img_size, img_size) if img_size else tuple(config["input_size"][1:])
    return Pretrained(model, Preprocessing(size, tuple(config["mean"]), tuple(config["std"])), name, arguments)


def run(
    pretrained: Pretrained,
    data: Path,
    out: Path,
    idle_ratio: float | list[float],
    *,
    allocate: bool,
    crops: int,
    steps: int,
    tokens: int | None,
    distill: int,
    batch: int,
    seed: int,
) -> Outcome:
    """Idle, distill block by block on ``distill`` other crops of each photo if not 0, write the file, measure."""
    model, preprocessing = pretrained.model, pretrained.preprocessing
    calibrating, testing = photos_in(data, seed)
    tested = Crops(testing, preprocessing, 0, batch, seed)
    idled = idle_pretrained(
        model,
        Crops(calibrating, preprocessing, crops, batch, seed),
        idle_ratio,
        allocate=allocate,
        steps=steps,
        tokens_per_image=tokens,
        seed=seed,
    )
    blocks: Any = idled.idle_report
    kept, undistilled = fidelity(model, idled, tested), None
    if distill:
        undistilled = kept
        distill_blocks(idled, model, Crops(calibrating, preprocessing, distill, batch, seed + 1), seed=seed)
        kept = fidelity(model, idled, tested)
    if pretrained.timm_name is None:
        save_checkpoint(idled, out)
    else:
        save_idled(idled, out, pretrained.timm_name, **(pretrained.arguments or {}))
    size = preprocessing.size
    images = torch.randn(8, 3, *size, generator=torch.Generator().manual_seed(seed))
    costs = [complexity(m, size) for m in (model, idled)]
    return Outcome(blocks, kept, undistilled, speed(model, idled, images), costs[0], costs[1])


def plot(outcome: Outcome, path: Path, title: str) -> None:
    """Cosine behind every block, and images per second before and after, as a picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    curves = {"block by block": outcome.undistilled, "distilled": outcome.fidelity}
    if outcome.undistilled is None:
        curves = {"block by block": outcome.fidelity}
    for label, kept in curves.items():
        assert kept is not None
        left.plot(range(len(kept.blocks)), list(kept.blocks.values()), marker="o", label=label)
    left.set(xlabel="idled block", ylabel="cosine to the original", title=title)
    left.grid(alpha=0.3)
    left.legend()
    right.bar(["original", "idled"], [outcome.speed.original, outcome.speed.idled], color=["tab:gray", "tab:blue"])
    right.set(ylabel="images/s, both fused", title=f"{outcome.speed.gain:.2f}x")
    figure.savefig(path, dpi=110)


def _image_size(model: Any, img_size: int | None = None) -> tuple[int, int]:
    return (img_size, img_size) if img_size else image_of(model)[0]
