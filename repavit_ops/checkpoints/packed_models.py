"""Fused models as files to map: weights as the CPU kernels read them, and how to build the tree around them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..nn.given import require_weights, require_whole, unwrapped
from ..nn.mode import require_eval
from ..nn.packed_weights import PACKABLE, PackedWeights
from .mapped_file import PACKED, PADDING, MappedFile, sha256_of, write_mapped
from .rebuilding import Builder, Recipe, differences, operator_of, recipe_of, tree_of, versions_of

FORMAT = 1  # version of what this file writes into the metadata
SUFFIX = ".safetensors"
HEADER, MAGIC, FINGERPRINT = 64, 8, 8  # bytes: of a packed copy's header, its first and its last field
STANDS_ALONE = (1).to_bytes(FINGERPRINT, "little")  # Fingerprint::kOfNothing: no weights to compare with
COPY = "packed"  # name of a module's packed copy among its tensors
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in PACKABLE}
SHOWN = 4


def save_packed(
    fused: nn.Module,
    path: str | os.PathLike[str],
    *,
    arguments: dict[str, Any] | None = None,
    build: Builder | None = None,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Write a fused model so that :func:`load_packed` maps it: nothing is read, folded, packed or copied at start.

    Every level of instructions reads the same packed copies, so a file serves all CPUs of little-endian machines.

    Args:
        fused: what :func:`repavit_ops.fuse` returned, on the CPU, in any dtype that the kernels pack.
        path: ending in .safetensors; a file there is replaced once the new one is complete.
        arguments: for a model of timm, what ``create_model`` was given beside the name; default what the model tells.
        build: for a model that is neither of this library nor of timm or transformers: makes the unfused model, of
            any weights. It is called under ``torch.device("meta")``.
        source: the file that the weights came from; its sha256 goes into the metadata, for :func:`load_packed`.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing is left behind.
        RuntimeError: the model is in training mode.
        ValueError: nothing in the model is packed; it is not on the CPU; its tree cannot be built again (names where
            they differ and what to pass).
    """
    path = _checked(path)
    model = unwrapped(fused)
    require_eval(model)
    require_whole(model, "save")
    require_weights(model, "save")
    if any(not t.is_cpu for t in (*model.parameters(), *model.buffers())):
        raise ValueError("model: got weights on other devices, wanted them on the CPU: model.cpu()")
    fused_parts = {name: part for name, part in model.named_modules() if isinstance(part, PackedWeights)}
    copies = {name: copy for name, part in fused_parts.items() if (copy := _copy_of(part)) is not None}
    if not copies:
        raise ValueError(f"model: got one without packed weights, {_why_unpacked(model, fused_parts)}")
    recipe = recipe_of(model, arguments, build is not None)
    operators = {name: made for name, part in fused_parts.items() if (made := operator_of(part)) is not None}
    if found := list(differences(model, tree_of(recipe, operators, build))):
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"model: building it again by {_named(recipe)} gives another one: {'; '.join(found[:SHOWN])}{more}. Pass "
            "arguments= (what timm.create_model was given) or build= (a function that makes the unfused model)"
        )
    tensors, aliases = _tensors(model, copies)
    description = {
        "format": FORMAT,
        "byteorder": sys.byteorder,
        "versions": versions_of(recipe),
        "made_with": {"torch": torch.__version__, "level": backends.cpu_isa()},
        "recipe": recipe,
        "operators": operators,
        "copies": {name: _copy_description(fused_parts[name], copy) for name, copy in copies.items()},
        "aliases": aliases,
        "source": None if source is None else {"name": Path(source).name, "sha256": sha256_of(source)},
    }
    write_mapped(path, tensors, {"format": "pt", PACKED: json.dumps(description)})


def load_packed(
    path: str | os.PathLike[str],
    *,
    build: Builder | None = None,
    source: str | os.PathLike[str] | None = None,
    check: bool = False,
) -> nn.Module:
    """The fused model of a file of :func:`save_packed`, its weights mapped: processes of a machine share their pages.

    It answers bit for bit as the model that was saved, and is as one of ``fuse(keep_unpacked=False)``: packed weights
    can be loaded (``load_state_dict``) and assigned, and are neither read nor trained. What is written to any other
    tensor of it stays in this process. Do not write into the file while it is in use; replace it.

    Args:
        path: the file.
        build: as :func:`save_packed` was given it.
        source: a file; ValueError unless the weights came from one with its sha256.
        check: read all of the file first and compare its sha256, which costs about as long as reading it.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the library that builds its tree is not installed.
        RuntimeError: the C++ kernels are not available here.
        ValueError: the file is damaged, of another kind, of other versions or layouts, or of other weights than
            ``source``'s. Says what to do.
    """
    if (reason := backends.why_unavailable("cpp")) is not None:
        raise RuntimeError(f"load_packed: packed weights are read by the C++ kernels only: {reason}")
    file = MappedFile(_checked(path))
    if check:
        file.require_digest()
    try:
        return _loaded(file, _description(file), build, source)
    except (
        AttributeError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:  # what stands in the metadata is of another form
        raise file.damaged(f"its metadata describe no model: {error!r}") from error


# --- saving -----------------------------------------------------------------------------------------------------------


def _checked(path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"path: got {str(path)!r}, wanted a name ending in {SUFFIX}")
    return Path(path)


def _copy_of(module: PackedWeights) -> Tensor | None:
    """The packed copy of a module's weights as they are now."""
    module.repack()
    return module.packed_copy


def _why_unpacked(model: nn.Module, fused_parts: dict[str, PackedWeights]) -> str:
    if not fused_parts:
        return "since nothing in it is fused: repavit_ops.fuse(model) first"
    if (reason := backends.why_unavailable("cpp")) is not None:
        return f"which the C++ kernels make: {reason}"
    part = next(iter(fused_parts.values()))
    dtype = getattr(part, part.packed_names[0]).dtype
    if part.choice is not None and part.choice.kernel_never:
        return f"since its blocks are left to PyTorch {part.choice.why}; fuse it with backend='cpp'"
    return f"since its blocks run on backend {part.backend!r} in {dtype}; fuse it with backend='auto' in another dtype"


def _copy_description(module: PackedWeights, copy: Tensor) -> dict[str, Any]:
    weights = {name: getattr(module, name) for name in module.packed_names}
    return {
        "layout": bytes(copy[:MAGIC].tolist()).decode("ascii"),
        "dtype": str(next(w.dtype for w in weights.values() if w is not None)).removeprefix("torch."),
        "shapes": {name: list(w.shape) for name, w in weights.items() if w is not None},
    }


def _tensors(model: nn.Module, copies: dict[str, Tensor]) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
    """What goes into the file, packed copies first, and the names of tensors that are others once more."""
    tensors: dict[str, list[Tensor]] = {}
    for name, copy in copies.items():
        alone = torch.tensor(list(STANDS_ALONE), dtype=torch.uint8)
        tensors[_join(name, COPY)] = [copy[: HEADER - FINGERPRINT], alone, copy[HEADER:]]
    aliases: dict[str, str] = {}
    known: dict[int, str] = {}
    for name, module in model.named_modules():
        dropped = module.packed_names if name in copies and isinstance(module, PackedWeights) else ()
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or key in dropped:
                continue
            full = _join(name, key)
            if (first := known.setdefault(id(tensor), full)) != full:
                aliases[full] = first
            else:
                tensors[full] = [tensor.detach().contiguous()]
    return tensors, aliases


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _named(recipe: Recipe) -> str:
    return " ".join(str(recipe[key]) for key in ("of", "name", "class", "arguments") if key in recipe)


# --- loading ----------------------------------------------------------------------------------------------------------


def _description(file: MappedFile) -> dict[str, Any]:
    """What the metadata say, once it is of this version."""
    if PACKED not in file.metadata:
        raise ValueError(
            f"{file.path.name}: got a safetensors file that is no packed model; read it with "
            "repavit_ops.load_checkpoint, fuse that, and write it with save_packed"
        )
    try:
        description: dict[str, Any] = json.loads(file.metadata[PACKED])
    except (ValueError, RecursionError) as error:
        raise file.damaged(f"its description is no JSON: {error}") from error
    found = {"format": description["format"], "byte order": description["byteorder"], **description["versions"]}
    wanted = {"format": FORMAT, "byte order": sys.byteorder, **versions_of(description["recipe"])}
    if other := [
        f"{name} {found.get(name)} (here: {wanted[name]})" for name in wanted if found.get(name) != wanted[name]
    ]:
        raise ValueError(
            f"{file.path.name}: got a packed model of {', '.join(other)}, which may mean another one here; convert it "
            "again here: save_packed or repavit-ops convert --packed"
        )
    return description


def _loaded(
    file: MappedFile, description: dict[str, Any], build: Builder | None, source: str | os.PathLike[str] | None
) -> nn.Module:
    if source is not None:
        _require_source(file, description["source"], source)
    try:
        model = tree_of(description["recipe"], description["operators"], build)
    except ImportError as error:
        raise ImportError(f"{file.path.name}: {error}") from error
    except Exception as error:  # constructors of other libraries have their own ways to refuse arguments
        raise ValueError(f"{file.path.name}: its model cannot be built: {error}") from error
    parts = dict(model.named_modules())
    copies = {name: _attached(file, name, parts.get(name), said) for name, said in description["copies"].items()}
    used = {_join(name, COPY) for name in copies} | _fill(file, parts, copies, description["aliases"])
    if left := sorted(name for name in file.entries.keys() - used if not name.startswith(PADDING)):
        raise file.damaged(f"it holds tensors that its model has no place for: {', '.join(left[:SHOWN])}")
    for name, module in copies.items():
        try:
            module.require_packed()
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise file.damaged(
                f"{_join(name, COPY)} is not what its model's weights are packed to: {reason}"
            ) from error
    return model


def _require_source(file: MappedFile, recorded: Any, source: str | os.PathLike[str]) -> None:
    if recorded is None:
        raise ValueError(f"source: {file.path.name} does not say which file it was made of; save_packed(source=…) does")
    if recorded["sha256"] != sha256_of(source):
        raise ValueError(
            f"source: {file.path.name} was made of {recorded['name']} with the sha256 {recorded['sha256'][:12]}…, and "
            f"{Path(source).name} has another: it is stale, or of another model; convert it again"
        )


def _attached(file: MappedFile, name: str, module: nn.Module | None, described: dict[str, Any]) -> PackedWeights:
    """A module whose weights a packed copy of the file stands in for."""
    full = _join(name, COPY)
    entry = file.entries.get(full)
    if not isinstance(module, PackedWeights) or entry is None or entry.dtype != torch.uint8:
        raise file.damaged(f"{full} belongs to no operator, or is missing")
    dtype, packed = DTYPES[described["dtype"]], file.tensor(full)
    shapes = {key: list(w.shape) for key in module.packed_names if (w := getattr(module, key)) is not None}
    if described["shapes"] != shapes:
        raise file.damaged(f"{name} has weights of {described['shapes']}, and its model has {shapes}")
    head = bytes(packed[:HEADER].tolist())
    if len(head) < HEADER or not head.startswith(described["layout"].encode()):
        raise file.damaged(f"{full} begins with {head[:MAGIC]!r}, wanted {described['layout']}")
    if head[-FINGERPRINT:] != STANDS_ALONE:
        raise file.damaged(f"{full} says that it follows weights, which no file holds")
    for key in shapes:  # so that the places of the weights are of the dtype of the copy
        module._parameters[key] = nn.Parameter(getattr(module, key).to(dtype), requires_grad=False)
    module.take_packed(packed.view(-1))
    return module


def _fill(
    file: MappedFile, parts: dict[str, nn.Module], copies: dict[str, PackedWeights], aliases: dict[str, str]
) -> set[str]:
    """Put tensors of the file in the places of all parameters and buffers that are not packed; their names there."""
    filled: dict[str, Tensor] = {}
    for name, module in parts.items():
        dropped = module.packed_names if name in copies and isinstance(module, PackedWeights) else ()
        places: tuple[Any, ...] = (module._parameters, module._buffers)
        for tensors in places:
            for key, place in tensors.items():
                if place is not None and key not in dropped:
                    full = _join(name, key)
                    tensors[key] = _place(file, full, aliases.get(full, full), place, filled)
    return set(filled)


def _place(file: MappedFile, full: str, stored: str, place: Tensor, filled: dict[str, Tensor]) -> Tensor:
    """What stands in a parameter's or buffer's place: a tensor of the file."""
    entry = file.entries.get(stored)
    if entry is None or entry.shape != tuple(place.shape) or entry.dtype.is_floating_point != place.is_floating_point():
        found = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise file.damaged(f"{full} has {found}, and its model wants {place.dtype} {list(place.shape)}")
    if stored not in filled:
        tensor = file.tensor(stored)
        filled[stored] = nn.Parameter(tensor, requires_grad=False) if isinstance(place, nn.Parameter) else tensor
    return filled[stored]
