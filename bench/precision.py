"""Errors of fused models over depth and on hostile activations:  python bench/precision.py [--depths 12 24 32]

Each row: a model, a dtype, the greatest error of the fused model and of eager PyTorch in that dtype against eager in
float64, both over the greatest final feature. Prints a table in Markdown; fails where ours is beyond twice eager's.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys

import torch
from torch import Tensor, nn

import repavit_ops
from repavit_ops import ops
from repavit_ops.models import VisionTransformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def model_of(depth: int, idle_ratio: float | None, seed: int = 0) -> nn.Module:
    """A ViT of 192 channels and 65 tokens whose branches add about as much as trained ones do; features, no head."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=192, depth=depth, num_heads=3, num_classes=0, idle_ratio=idle_ratio
    ).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embed" not in name and "token" not in name:
            p.normal_(0, (2 / math.sqrt(depth)) * p.shape[-1] ** -0.5 / 2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


@torch.no_grad()
def with_outliers(model: nn.Module, value: float) -> nn.Module:
    """Three channels that are far larger than the others in every token, as trained ViTs have."""
    model = copy.deepcopy(model)
    for channel, sign in ((5, 1), (77, -1), (130, 1)):
        model.pos_embed[..., channel] += sign * value
    return model


@torch.no_grad()
def with_offset(model: nn.Module, value: float) -> nn.Module:
    """All channels far above their spread."""
    model = copy.deepcopy(model)
    model.pos_embed += value
    return model


def errors(model: nn.Module, dtype: torch.dtype) -> tuple[float, float]:
    """Greatest error of the fused model and of eager, over the greatest feature."""
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    fused = repavit_ops.fuse(model, dtype=dtype)
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(x.double())
        eager = copy.deepcopy(model).to(dtype)(x.to(dtype))
        ours = fused(x.to(dtype))
    largest = truth.abs().max()
    return tuple(((t.double() - truth).abs().max() / largest).item() for t in (ours, eager))  # type: ignore[return-value]


def scores_beyond_fp16() -> tuple[float, float]:
    """Attention in float16 whose products q·k go to 4e5, six times what float16 holds, before they are scaled."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w_qkv = torch.cat((draw(128, 64) * 8, draw(64, 64) / 8))
    tensors = [draw(2, 33, 64), w_qkv, None, draw(64, 64) / 8, None]
    static = {"num_heads": 1, "scale": 1e-5, "d_qk": 64}
    truth = ops.rep_attention(*tensors, **static, backend="reference")
    half = [None if t is None else t.half() for t in tensors]
    ours, eager = (ops.rep_attention(*half, **static, backend=b) for b in ("cpp", "reference"))
    return tuple(((t.double() - truth).abs().max() / truth.abs().max()).item() for t in (ours, eager))  # type: ignore[return-value]


def main() -> None:
    """Print the table; exit code 1 if a row is beyond twice eager's error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="*", default=[12, 24, 32])
    depths = parser.parse_args().depths
    cases = {f"{depth} blocks": model_of(depth, None) for depth in depths}
    cases |= {f"{depth} blocks, merged at 0.75": model_of(depth, 0.75) for depth in depths}
    first = model_of(depths[0], None)
    cases |= {f"outlier channels of {value:g}": with_outliers(first, value) for value in (1e3, 1e4)}
    cases["offset of 1e4"] = with_offset(first, 1e4)
    print("| model | dtype | fused | eager | fused / eager |\n|---|---|---|---|---|")
    beyond = False
    for name, model in cases.items():
        for dtype in DTYPES:
            ours, eager = errors(model, dtype)
            beyond |= ours > 2 * eager + 1e-6
            print(f"| {name} | {str(dtype)[6:]} | {ours:.1e} | {eager:.1e} | {ours / eager:.2f} |", flush=True)
    ours, eager = scores_beyond_fp16()
    print(f"| attention, q·k to 4e5 | float16 | {ours:.1e} | {eager:.1e} | {ours / eager:.2f} |")
    sys.exit(beyond)


if __name__ == "__main__":
    main()
