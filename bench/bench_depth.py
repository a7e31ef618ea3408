"""Depth compression: ViT-Tiny of 12 blocks against 6, 4 and 3 merged ones, all fused: ``pytest bench/bench_depth.py``.

Latency and images per second at batch 1 and 8, with the same kernels, threads and precision for every depth; weights
are random, since time does not depend on them. The goal: at batch 1 at most 0.56, 0.40 and 0.32 of 12 blocks.
"""

from __future__ import annotations

import pytest
import torch

import repavit_ops
from repavit_ops.benchmarking.harness import check, interleave
from repavit_ops.models import complexity

IMAGE = 224
DEPTHS = (6, 4, 3)


def fused(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model as trained, α = 1, and merged and fused."""
    torch.manual_seed(0)
    model = repavit_ops.create_model(name, img_size=IMAGE).eval()
    if name.startswith("joined"):
        repavit_ops.set_join(model, 1.0)
    return model, repavit_ops.fuse(model)


@pytest.mark.parametrize("batch", [1, 8], ids=lambda batch: f"batch{batch}")
@torch.inference_mode()
def test_depth(report, batch):
    names = {12: "vanilla_vit_tiny", **{depth: f"joined_vit_tiny_{depth}" for depth in DEPTHS}}
    x = torch.randn(batch, 3, IMAGE, IMAGE)
    models = {}
    for depth, name in names.items():
        trained, models[depth] = fused(name)
        eager, ours = trained(x), models[depth](x)
        check(name, ours, eager, trained.double()(x.double()))
    times = interleave({str(depth): lambda model=model: model(x) for depth, model in models.items()}, rounds=25)
    base = times["12"].p50
    for depth, model in models.items():
        size, seconds = complexity(model, IMAGE), times[str(depth)].p50
        report(
            case=f"vit_tiny, {depth} blocks, batch {batch}",
            dtype="float32",
            ratio=base / seconds,
            ratios={"12 blocks": base / seconds},
            latency_share=seconds / base,
            images_per_second=batch / seconds,
            params=size.params,
            macs=size.macs,
            gflops=2 * size.macs * batch / seconds / 1e9,
            seconds={"repavit_ops": list(vars(times[str(depth)]).values())},
        )
        print(
            f"{depth:>2} blocks  {size.mparams:.2f} MParams  {size.gmacs:.3f} GMACs  batch {batch}: "
            f"{1e3 * seconds:.2f} ms, {batch / seconds:.1f} images/s, {seconds / base:.2f} of 12 blocks"
        )
