"""The recipes of examples/imagenet under timm: its data, optimizer, scheduler and checkpoints, on real pictures.

timm's ``train.py`` itself is in no package. With ``TIMM_TRAIN_SCRIPT`` naming a copy, the last test runs it as it is.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from model_helpers import TORCHVISION_STUB, images, relative
from reparam_helpers import EXACT
from torch import nn

import repavit_ops
from repavit_ops.models import complexity
from repavit_ops.nn.join import JoinedBranches

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "imagenet"
VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL = {  # what makes the recipe's model a small one of the same kind
    "repa_deit": VIT,
    "repa_vit": VIT,
    "repa_swin": {"img_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "repa_lvvit": {**VIT, "act_channels": 48},
    "joined_vit_tiny": {**VIT, "join_steps": 6, "join_hold": 0.5},
}
STEPS = 3  # of an epoch
BATCH = 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """An image folder of two classes: pieces of the two photographs that scikit-learn ships."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the pictures need scikit-learn")
    image = pytest.importorskip("PIL.Image", reason="the pictures need Pillow")
    root = tmp_path_factory.mktemp("pictures")
    for name in ("china", "flower"):
        photo = image.fromarray(datasets.load_sample_image(f"{name}.jpg"))
        for piece in range(8):
            folder = root / ("train" if piece < 6 else "validation") / name
            folder.mkdir(parents=True, exist_ok=True)
            left, top = 150 * (piece % 4), 200 * (piece // 4)
            photo.crop((left, top, left + 150, top + 200)).save(folder / f"{piece}.png")
    return root


def recipe(timm: ModuleType, name: str) -> argparse.Namespace:
    """A recipe, small, for one process and a few steps."""
    import yaml

    args = argparse.Namespace(**yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    args.model_kwargs = {**getattr(args, "model_kwargs", {}), **SMALL[name]}
    args.warmup_epochs, args.momentum = 1, 0.9
    # at magnitude 9 some pictures would be posterized to 0 bits, which Pillow 13 refuses and timm 1.0.31 asks for
    args.aa = args.aa.replace("-m9-", "-m5-")
    return args


def loader_of(args: argparse.Namespace, folder: Path):
    from timm.data import FastCollateMixup, create_dataset, create_loader

    mix = FastCollateMixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing, num_classes=2
    )
    return create_loader(
        create_dataset("", root=folder, split="train", is_training=True),
        input_size=(3, 32, 32),
        batch_size=BATCH,
        is_training=True,
        re_prob=args.reprob,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        collate_fn=mix,
        num_workers=0,
        device=torch.device("cpu"),
    )


def train(args: argparse.Namespace, folder: Path, out: Path, epochs: range, resume: Path | None = None):
    """What train.py does, out of the same parts; returns the model, the learning rate of every epoch, a checkpoint."""
    import timm
    from timm.loss import SoftTargetCrossEntropy
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2, optimizer_kwargs
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs
    from timm.utils import CheckpointSaver

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=2, drop_path_rate=args.drop_path, **args.model_kwargs)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    assert type(optimizer).__name__ == "Lamb"
    if resume is not None:
        assert resume_checkpoint(model, str(resume), optimizer, log_info=False) == epochs.start
    loader = loader_of(args, folder)
    assert len(loader) == STEPS
    scheduler, total = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=STEPS)
    assert total == 300
    scheduler.step(epochs.start)
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(out), recovery_dir=str(out))
    rates = []
    for epoch in epochs:
        model.train()
        rates.append(optimizer.param_groups[0]["lr"])
        for step, (x, target) in enumerate(loader):
            with torch.autocast("cpu", getattr(torch, args.amp_dtype), enabled=args.amp):
                loss = SoftTargetCrossEntropy()(model(x), target)
            loss.backward()
            assert loss.isfinite()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step_update(epoch * STEPS + step + 1)
        saver.save_checkpoint(epoch, metric=0.0)
        scheduler.step(epoch + 1)
    return model, rates, out / "last.pth.tar"


def merges_exactly(model: nn.Module) -> bool:
    model, x = model.double().eval(), images(3).double()
    merged = repavit_ops.reparameterize(model)
    assert complexity(merged, 32).params < complexity(model, 32).params
    return relative(merged(x), model(x)) <= EXACT


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("repa")])
def test_a_recipe_trains_resumes_reloads_and_merges(timm, pictures, tmp_path, name):
    args = recipe(timm, name)
    first = timm.create_model(args.model, num_classes=2, **args.model_kwargs)
    model, rates, saved = train(args, pictures, tmp_path, range(1))
    assert rates == [args.warmup_lr]
    assert all((a != b).any() for a, b in zip(model.parameters(), first.parameters(), strict=True) if a.dim() > 1)
    model, rates, saved = train(args, pictures, tmp_path, range(1, 2), saved)
    assert rates == pytest.approx([args.lr], rel=1e-3)
    # as the README says to load it
    again = timm.create_model(args.model, num_classes=2, checkpoint_path=str(saved), **args.model_kwargs)
    assert relative(again.eval()(images()), model.eval()(images())) == 0
    assert merges_exactly(again)


def test_the_joined_recipe_raises_alpha_by_itself_and_merges_at_the_end_only(timm, pictures, tmp_path):
    args = recipe(timm, "joined_vit_tiny")
    model, _, saved = train(args, pictures, tmp_path, range(1))
    assert int(model.join_step) == STEPS
    joins = [module.join for module in model.modules() if isinstance(module, JoinedBranches)]
    assert joins == [pytest.approx(7 / 12)] * 4
    with pytest.raises(RuntimeError, match=r"join coefficient alpha is 0\.58"):
        repavit_ops.reparameterize(model.eval())
    _, _, saved = train(args, pictures, tmp_path, range(1, 2), saved)
    again = timm.create_model(args.model, num_classes=2, checkpoint_path=str(saved), **args.model_kwargs)
    assert int(again.join_step) == 2 * STEPS
    assert merges_exactly(again)


@pytest.mark.parametrize("name", SMALL)
def test_weight_decay_is_for_matrices(timm, name):
    """Stacked branches have biases and affines [B, ...], which timm would take for matrices."""
    from timm.optim import create_optimizer_v2, optimizer_kwargs

    args = recipe(timm, name)
    model = timm.create_model(args.model, num_classes=2, **args.model_kwargs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = create_optimizer_v2(model, **optimizer_kwargs(args)).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    matrices = {n for n in names.values() if n.endswith("weight") and "norm" not in n and ".bn" not in n}
    assert decayed == matrices


@pytest.mark.parametrize(
    ("name", "lr", "drop_path"), [("repa_deit", 4e-3, 0.1), ("repa_vit", 1e-3, 0.3), ("repa_swin", 4e-3, 0.1)]
)
def test_recipes_hold_the_papers_table_7(timm, name, lr, drop_path):
    args = recipe(timm, name)
    assert (args.lr, args.drop_path, args.opt, args.sched, args.epochs) == (lr, drop_path, "lamb", "cosine", 300)
    assert (args.min_lr, args.warmup_lr, args.weight_decay) == (5e-5, 1e-6, 0.05)
    assert 4096 % args.batch_size == 0
    assert args.model_kwargs["idle_ratio"] == 0.75


# --- the launcher ----------------------------------------------------------------------------------------------------


def launch(script: Path, *arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    stub = f"import sys, types; sys.modules[{TORCHVISION_STUB!r}] = types.ModuleType('stub')"
    (tmp_path / "sitecustomize.py").write_text(stub)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(RECIPES / "launch.py"), str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_the_launcher_runs_a_script_that_never_heard_of_us(timm, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\n"
        "if __name__ == '__main__': print(sys.argv, timm.create_model('repa_deit_tiny', depth=1).num_classes)"
    )
    done = launch(script, "--model", "x", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{[str(script), '--model', 'x']} 1000"


@pytest.mark.skipif("TIMM_TRAIN_SCRIPT" not in os.environ, reason="TIMM_TRAIN_SCRIPT names no copy of timm's train.py")
@pytest.mark.parametrize("name", SMALL)
def test_timms_own_script_runs_the_recipe(timm, pictures, tmp_path, name):
    kwargs = {**recipe(timm, name).model_kwargs, "img_size": 32}
    done = launch(
        Path(os.environ["TIMM_TRAIN_SCRIPT"]), "--config", str(RECIPES / f"{name}.yaml"), "--data-dir", str(pictures),
        "--img-size", "32", "--num-classes", "2", "--batch-size", str(BATCH), "--epochs", "2", "--warmup-epochs", "1",
        "--aug-repeats", "0", "--workers", "0", "--device", "cpu", "--output", str(tmp_path), "--experiment", "run",
        "--model-kwargs", *(f"{key}={value!r}".replace(" ", "") for key, value in kwargs.items()),
        tmp_path=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    saved, name = tmp_path / "run" / "last.pth.tar", recipe(timm, name).model
    assert merges_exactly(timm.create_model(name, num_classes=2, checkpoint_path=str(saved), **kwargs))
