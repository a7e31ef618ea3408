"""Checkpoint files as containers: a state dict and what the file says of its model, read without running code."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .mapped_file import PACKED
from .shards import INDEX, read_index, refuse_what_stands_for_a_file

SUFFIXES = (".safetensors", ".pth", ".pt")
STATES = ("model", "state_dict")
AVERAGED_STATES = ("model_ema", "state_dict_ema")
ARGUMENTS = ("idle_ratio", "heuristic", "channel_idle", "feature_norm")  # of the authors' args, what the state lacks


class Checkpoint(NamedTuple):
    """A state dict with plain keys, the model's config ({} where the file has none) and a name for errors."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    origin: str


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any], *, ema: bool = False) -> Checkpoint:
    """Read a file or a dict; no tensor returned shares storage with ``source``.

    Understood are a bare state dict and ``{"model" or "state_dict": …, "model_ema": …, "args": …, "config": …}``.
    The prefixes of DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) are removed.

    Args:
        source: a path ending in .safetensors, .pth or .pt, or in .safetensors.index.json with the shards beside it,
            or such a dict.
        ema: read the averaged weights ("model_ema") instead.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the suffix is unknown; the file is damaged, would have to run code to be read, holds no state dict,
            is one shard of several or stands for a file (Git LFS); a shard is missing.
    """
    if isinstance(source, Mapping):
        return _unpack(source, "the dict", ema, copy=True)
    path = Path(source)
    _check_suffix(path, (*SUFFIXES, INDEX))
    if not path.is_file():
        raise FileNotFoundError(f"source: got {str(path)!r}, wanted an existing file")
    refuse_what_stands_for_a_file(path)
    if path.name.endswith(INDEX):
        _refuse_average(path, ema)
        return Checkpoint(_plain_keys(read_index(path), path.name), {}, path.name)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, ema)
    return _unpack(_read_pickle(path), path.name, ema, copy=False)


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a state dict and its config; a file already there is replaced only once the new one is complete.

    Args:
        path: ending in .safetensors (config in the metadata, as JSON) or .pth, .pt (``{"model": …, "config": …}``).
        state: tensors by key, on any device.
        config: JSON values.

    Raises:
        ValueError: the suffix is unknown.
    """
    path = Path(path)
    _check_suffix(path)
    # clones: a view would drag its whole storage into the file, and safetensors refuses shared storage
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(own, unfinished, metadata={"format": "pt", "config": json.dumps(config)})
        else:
            torch.save({"model": own, "config": dict(config)}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    if not path.name.endswith(suffixes):
        raise ValueError(f"path: got {str(path)!r}, wanted a name ending in {', '.join(suffixes)}")


def _read_safetensors(path: Path, ema: bool) -> Checkpoint:
    _refuse_average(path, ema)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if PACKED in metadata:
                raise ValueError(
                    f"{path.name}: got a packed model, wanted a checkpoint; repavit_ops.load_packed reads it"
                )
            # clones: the tensors would otherwise be windows into the file on disk
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        config = json.loads(metadata.get("config", "{}"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: got a damaged safetensors file ({error})") from error
    return Checkpoint(_plain_keys(state, path.name), config, path.name)


def _refuse_average(path: Path, ema: bool) -> None:
    if ema:
        raise ValueError(f"ema: got True for {path.name}; a safetensors file holds one state dict, pass ema=False")


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler fails in many ways on files that are not checkpoints
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ValueError(
                f"{path.name}: got a file that torch.load cannot read: damaged or no checkpoint"
            ) from error
        raise ValueError(
            f"{path.name}: got a pickle of {named[1]}, wanted tensors, plain values and argparse.Namespace only; "
            "reading it could run code, so it was refused. If you trust where it came from, extract the state dict "
            "where it was made: torch.save({'model': model.state_dict()}, path)"
        ) from error


def _unpack(container: Any, origin: str, ema: bool, copy: bool) -> Checkpoint:
    if not isinstance(container, Mapping):
        raise ValueError(f"{origin}: got a {type(container).__name__}, wanted a state dict or a dict that holds one")
    is_state = bool(container) and all(isinstance(value, Tensor) for value in container.values())
    state: Any = container
    if not is_state or ema:
        wanted = AVERAGED_STATES if ema else STATES
        name = next((name for name in wanted if isinstance(container.get(name), Mapping)), None)
        if name is None:
            raise ValueError(_no_state(container, origin, ema))
        state = container[name]
    strays = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if strays:
        raise ValueError(f"{origin}: got values that are not tensors in its state dict: {', '.join(strays[:8])}")
    plain = _plain_keys({str(k): v.detach().clone() if copy else v for k, v in state.items()}, origin)
    return Checkpoint(plain, {} if is_state else _config(container, origin), origin)


def _no_state(container: Mapping[str, Any], origin: str, ema: bool) -> str:
    found = ", ".join(map(str, list(container)[:8])) or "nothing"
    wanted = AVERAGED_STATES if ema else STATES
    message = f"{origin}: got entries {found}, wanted a state dict under {' or '.join(wanted)}"
    if ema:
        return f"{message}; pass ema=False for the weights that are not averaged"
    if any(name in container for name in AVERAGED_STATES):
        return f"{message}; pass ema=True for the averaged weights"
    return message


def _config(container: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The file's own config over the few constructor arguments among the authors' training arguments."""
    args = container.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    config = container.get("config") or {}
    if not isinstance(config, Mapping):
        raise ValueError(f"{origin}: got a config of type {type(config).__name__}, wanted a mapping")
    return {name: args[name] for name in ARGUMENTS if name in args} | dict(config)


def _plain_keys(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    plain = {re.sub(r"^(?:module\.)+", "", key.replace("_orig_mod.", "")): value for key, value in state.items()}
    if len(plain) != len(state):
        raise ValueError(f"{origin}: got keys that are equal once 'module.' and '_orig_mod.' are removed")
    return plain
