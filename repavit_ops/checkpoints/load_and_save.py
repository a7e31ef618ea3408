"""Loading and saving: checkpoint files to models and back, in the authors' layout and in ours."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.patch_embed import pair
from ..models.swin import SwinTransformer
from ..models.vit import VisionTransformer
from ..nn import ChannelIdleFFN, PartialGELUFFN
from ..nn.given import require_weights, require_whole, unwrapped
from . import config_from_shapes, idled_timm
from .authors_layout import (
    CLASSES,
    Family,
    StateForm,
    derived_buffers,
    family_of,
    ffns,
    form_of,
    take_identities,
    their_names,
    to_authors,
    to_native,
)
from .description import build, describe, fill_derived_buffers
from .files import read_checkpoint, write_checkpoint

Layout = Literal["native", "authors"]
# what may differ between a model and its reload from the authors' layout without changing what it computes
IMMATERIAL = ("drop", "drop_path", "drop_rate", "drop_path_rate", "backend", "img_size")


def load_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    ema: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Load a model: the authors' training or deployed checkpoints of ViT and Swin, or any file of ours.

    Family and form are told from the keys, sizes from the shapes. Files of :func:`save_checkpoint` need nothing else.
    Beyond that a ViT needs ``num_heads``, and a training checkpoint how many channels idle: ``idle_ratio`` (θ, one or
    per block, under ``heuristic="linear"`` if trained so) or ``act_channels`` (m). They are looked for in
    ``overrides``, then ``config``, then the file (its config; ``idle_ratio`` and ``heuristic`` of the authors'
    ``args``). Nothing in a file is ever run.

    Args:
        source: path ending in .safetensors, .pth or .pt, or in .safetensors.index.json with the shards beside it, or a
            dict: a bare state dict, or one under "model" or "state_dict", with DistributedDataParallel's and
            torch.compile's prefixes or without.
        config: the authors' constructor arguments (``{"embed_dim": 192, "num_heads": 3, …}``, unknown ones are
            ignored), or ``{"model": describe(model)}`` for a bare state dict of a model of ours.
        ema: load the averaged weights ("model_ema").
        overrides: single arguments that win over ``config``.

    Returns:
        The model in evaluation mode, on the CPU, in the dtype of the file. Authors' deployed FFNs become
        :class:`repavit_ops.nn.PartialGELUFFN`, a plain residual in place of an fc1 that is exactly I.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file would have to run code to be read; the keys are of no known model or of mixed forms; an
            argument is missing, unknown or contradicts a shape; a key is missing, unexpected or misshapen (all of them
            are named). Says what to do.
    """
    file = read_checkpoint(source, ema=ema)
    if file.config.get("layout") == idled_timm.LAYOUT:
        _refuse_arguments(config, overrides)
        return idled_timm.load_idled(file)
    description = (config or {}).get("model") or file.config.get("model")
    if description is not None:
        _refuse_arguments(config, overrides)
        model = build(description)
        return _fill(model, file.state, file.origin, list)
    if unknown := set(overrides) - {
        "family",
        *config_from_shapes.IDLENESS,
        *config_from_shapes.FIXED,
        *sum(config_from_shapes.KNOWN.values(), ()),
    }:
        known = ", ".join(sorted({*config_from_shapes.IDLENESS, *sum(config_from_shapes.KNOWN.values(), ())}))
        raise ValueError(f"{', '.join(sorted(unknown))}: got an unknown argument, wanted one of {known}")
    family = family_of(file.state)
    form = form_of(file.state, family)
    settled = config_from_shapes.settle(file.config, config or {}, overrides)
    model, native = _model_for(file.state, family, form, settled)
    return _fill(model, native, file.origin, their_names if form == "deployed" else list)


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    layout: Layout = "native",
    *,
    img_size: int | tuple[int, int] | None = None,
) -> None:
    """Write a model so that :func:`load_checkpoint` restores it from the file alone.

    "native" keeps our keys and holds every model of this package: training, merged or fused. "authors" writes what the
    authors' code reads, for a training or merged :class:`VisionTransformer` or :class:`SwinTransformer`: a shortcut
    beside w_merged goes back into it (fc1), I where no channel is idle; Swin's index and mask buffers are written.

    Args:
        model: what to save.
        path: ending in .safetensors (config in its metadata), or .pth, .pt (``{"model": …, "config": …}``).
        layout: "native" or "authors".
        img_size: pixels that the masks of a Swin in the authors' layout are made for; default the model's own.

    Raises:
        ValueError: an unknown layout or suffix; a model that the layout cannot hold, such as a fused one in the
            authors' (save before fusing), or in bf16 or fp16 a shortcut that would round w_merged away (save
            ``model.float()``).
    """
    model = unwrapped(model)
    require_whole(model, "save")
    require_weights(model, "save")
    if layout == "native":
        description = describe(model)
        state = model.state_dict()
        if problems := list(_problems(build(description).state_dict(), state, list)):
            raise ValueError(f"model: got one whose weights its structure does not explain: {'; '.join(problems)}")
        config = {"layout": layout, "model": description}
    elif layout == "authors":
        image = _image_of(model, img_size)
        state = to_authors(model, image)
        config = {"layout": layout, **_authors_config(model, image)}
        _require_same_model(model, state, config)
    else:
        raise ValueError(f"layout: got {layout!r}, wanted 'native' or 'authors'")
    write_checkpoint(path, state, config)


# --- loading ----------------------------------------------------------------------------------------------------------


def _refuse_arguments(config: Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> None:
    given = [name for name in (config or {}) if name not in ("model", "layout")] + list(overrides)
    if given:
        raise ValueError(
            f"{', '.join(given)}: got arguments for a checkpoint that describes its model completely; pass none"
        )


def _model_for(
    state: Mapping[str, Tensor], family: Family, form: StateForm, config: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of an authors' state dict on the meta device, and the state dict in our keys."""
    if form in ("merged", "fused"):
        raise ValueError(
            f"source: got a bare state dict of a {form} model of ours, which does not say where its shortcuts are; "
            'load a file of save_checkpoint, or pass config={"model": describe(model)}'
        )
    arguments = config_from_shapes.constructor_arguments(state, family, form, config)
    native = to_native(state, family, form)
    image = arguments["img_size"]
    if image is None:
        arguments["img_size"] = config_from_shapes.stand_in_image(state, arguments)
    dims = config_from_shapes.block_dims(arguments)
    if form == "deployed":
        arguments |= {"mlp_ratio": 1.0, "act_channels": 0}  # stands in for the FFNs that the shapes mean
    else:
        hidden = [int(dim * arguments["mlp_ratio"]) for dim in dims]
        arguments["act_channels"] = config_from_shapes.training_act_channels(config, hidden, family)
    with torch.device("meta"):
        model: Any = CLASSES[family](**arguments)
    if form == "deployed":
        counts = _set_deployed_ffns(model, dims, native)
        config_from_shapes.check_deployed_act_channels(config, counts, dims)
    if isinstance(model, SwinTransformer):
        model.img_size = image
        _check_derived(model, state, image)
    return model, native


def _set_deployed_ffns(model: nn.Module, dims: list[int], native: dict[str, Tensor]) -> list[int]:
    """Replace every FFN by the merged one that the shapes mean; returns m of each."""
    identities, counts = take_identities(native), []
    for (name, _), dim in zip(list(ffns(model)), dims, strict=True):
        w_in, w_out = native.get(f"{name}.w_in"), native.get(f"{name}.w_out")
        count = w_in.shape[0] if w_in is not None else w_out.shape[-1] if w_out is not None else 0
        plain = name in identities
        ffn = PartialGELUFFN(dim, count, merged=not plain, residual=plain, backend="reference", device="meta")
        model.set_submodule(name, ffn)
        counts.append(count)
    return counts


def _check_derived(model: Any, state: Mapping[str, Tensor], image: tuple[int, int] | None) -> None:
    """Raise ValueError unless the stored index and mask buffers are those that Swin's arguments mean."""
    wanted = derived_buffers(model, image)
    wrong = [key for key in wanted if key in state and not torch.equal(state[key].to(wanted[key]), wanted[key])]
    if wrong:
        raise ValueError(
            f"source: got {len(wrong)} index or mask buffers that are not those of a Swin with windows of "
            f"{model.layers[0].blocks[0].attn.window[0]} and images of {image}: {_listed(wrong)}; the weights were "
            "trained with another windowing"
        )


def _fill(model: nn.Module, state: Mapping[str, Tensor], origin: str, named: Any) -> nn.Module:
    """Put a state dict into a model on the meta device, or raise ValueError naming every key that does not fit."""
    if problems := list(_problems(model.state_dict(), state, named)):
        raise ValueError(
            f"{origin}: the state dict does not fit the {type(model).__name__} that its keys and config mean:\n  "
            + "\n  ".join(problems)
            + "\nCheck that the file is complete and unchanged, and that config is this model's."
        )
    model.load_state_dict(state, assign=True)
    fill_derived_buffers(model)
    return model.eval()


def _problems(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], named: Any) -> Iterator[str]:
    """One line each for missing, unexpected and misshapen keys."""
    missing = [key for key in wanted if key not in got]
    unexpected = [key for key in got if key not in wanted]
    shared = [key for key in wanted if key in got]
    misshapen = [key for key in shared if got[key].shape != wanted[key].shape]
    mistyped = [key for key in shared if got[key].is_floating_point() != wanted[key].is_floating_point()]
    if missing:
        yield f"missing {len(missing)}: {_listed(named(missing))}"
    if unexpected:
        yield f"unexpected {len(unexpected)}: {_listed(named(unexpected))}"
    if misshapen:
        shapes = [f" got {list(got[key].shape)}, wanted {list(wanted[key].shape)}" for key in misshapen]
        yield f"misshapen {len(misshapen)}: {_listed(named(misshapen), shapes, '; ')}"
    if mistyped:
        yield f"not of a floating dtype or wrongly so, {len(mistyped)}: {_listed(named(mistyped))}"


def _listed(keys: list[str], notes: list[str] | None = None, separator: str = ", ", limit: int = 12) -> str:
    """Keys, each with its note; beyond ``limit`` those that differ in a number only are counted together."""
    notes = notes or [""] * len(keys)
    if len(keys) <= limit:
        return separator.join(key + note for key, note in zip(keys, notes, strict=True))
    groups: dict[tuple[str, str], int] = {}
    for key, note in zip(keys, notes, strict=True):
        group = (re.sub(r"(?<=\.)\d+(?=\.)", "*", key), note)
        groups[group] = groups.get(group, 0) + 1
    return separator.join(f"{key}{note}" + (f" ({n} keys)" if n > 1 else "") for (key, note), n in groups.items())


# --- saving in the authors' layout ------------------------------------------------------------------------------------


def _image_of(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Image size of a Swin, which its masks are made for, or of a ViT; None for other models."""
    if isinstance(model, SwinTransformer):
        known = getattr(model, "img_size", None) if img_size is None else img_size
        if known is None:
            raise ValueError("img_size: got nothing, wanted the image size that the Swin's masks are made for")
        return pair(known)
    if isinstance(model, VisionTransformer):
        return model.grid_size[0] * model.patch_size, model.grid_size[1] * model.patch_size
    return None


def _authors_config(model: Any, image: tuple[int, int] | None) -> dict[str, Any]:
    """The authors' constructor arguments of a ViT or Swin, read from the model; and m of each block."""
    mlps = [mlp for _, mlp in ffns(model)]
    swin = isinstance(model, SwinTransformer)
    attns = [blocks[0].attn for blocks in ([s.blocks for s in model.layers] if swin else [model.blocks]) if len(blocks)]
    config = {
        "family": "swin" if swin else "vit",
        "img_size": list(image or ()),
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
        "embed_dim": model.embed_dim,
        "feature_norm": "BatchNorm",
        "channel_idle": True,
        "act_channels": [mlp.act_channels for mlp in mlps],
        "head_bias": model.head_bias,
        "norm_eps": model.norm.eps,
        "drop_path_rate": model.drop_path_rate,
    }
    if isinstance(mlps[0], ChannelIdleFFN):
        config["mlp_ratio"] = mlps[0].hidden / mlps[0].dim
    if swin:
        windows = [attn.window[0] for attn in attns]
        depths = [len(stage.blocks) for stage in model.layers]
        return config | {
            "depths": depths,
            "num_heads": [attn.num_heads for attn in attns],
            "window_size": max(windows),
        }
    return config | {
        "depth": len(mlps),
        "num_heads": attns[0].num_heads,
        "block_norm_eps": getattr(attns[0].norm, "eps", 1e-5),
        "fc_norm": False,
        "global_pool": model.global_pool,
        "pre_norm": isinstance(model.norm_pre, nn.LayerNorm),
        "qkv_bias": attns[0].qkv.bias is not None,
    }


def _require_same_model(model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless loading the state dict would give back what the model computes."""
    family = family_of(state)
    form = form_of(state, family)
    reloaded, native = _model_for(state, family, form, config_from_shapes.settle(config))
    differing = list(_differences(describe(model), describe(reloaded), ""))
    differing += _problems(reloaded.state_dict(), native, list)
    if differing:
        raise ValueError(
            f"model: got what the authors' layout cannot tell ({'; '.join(differing[:6])}); save with layout='native'"
        )


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[str]:
    """Where two descriptions differ in what is computed."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        both = ours.get("type") == theirs.get("type") == "PartialGELUFFN"
        for key in {**ours, **theirs}:
            if key in IMMATERIAL or (both and key == "absent"):
                continue
            inner = path if key in ("args", "children") else f"{path}.{key}".lstrip(".")
            if both and key == "args":
                yield from _differences(ours[key] | {"residual": 0}, theirs[key] | {"residual": 0}, inner)
            else:
                yield from _differences(ours.get(key), theirs.get(key), inner)
    elif ours != theirs:
        yield f"{path}: {ours}, reloaded as {theirs}"
