"""Checkpoints in several safetensors files beside an index, as Hugging Face's libraries write large ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins
LARGEST_INDEX = 64 * 2**20  # bytes; the index of a model of 10,000 weights takes one MiB


def refuse_what_stands_for_a_file(path: Path) -> None:
    """Raise ValueError for a Git LFS pointer and for one shard of several."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{path.name}: got a Git LFS pointer of {path.stat().st_size} bytes, which stands for the checkpoint; "
                "fetch the file itself with: git lfs pull"
            )
    shard = SHARD.fullmatch(path.name)
    if shard is not None and int(shard["count"]) > 1:
        index = shard["stem"] + INDEX
        found = "" if path.with_name(index).is_file() else ", which is not in its folder"
        raise ValueError(
            f"{path.name}: got shard {int(shard['number'])} of {int(shard['count'])}, wanted all of them: "
            f"pass their index, {index}{found}"
        )


def read_index(path: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index names, which lie beside it.

    Raises:
        ValueError: the index is damaged or names files elsewhere; a shard is missing, damaged, or holds other tensors
            than the index says.
    """
    keys_of: dict[str, set[str]] = {}
    for key, name in _weight_map(path).items():
        keys_of.setdefault(name, set()).add(key)
    if missing := sorted(name for name in keys_of if not path.with_name(name).is_file()):
        raise ValueError(
            f"{path.name}: got an index without {len(missing)} of its {len(keys_of)} shards: {', '.join(missing[:4])}; "
            "put them beside it"
        )
    return {key: t for name, keys in sorted(keys_of.items()) for key, t in _tensors(path.with_name(name), keys)}


def _weight_map(path: Path) -> dict[str, str]:
    if path.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"{path.name}: got an index of {path.stat().st_size} bytes, wanted at most {LARGEST_INDEX}")
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: got an index that is no JSON ({error})") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f'{path.name}: got no index of safetensors files, wanted {{"weight_map": {{key: file}}}}')
    for name in names.values():
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise ValueError(
                f"{path.name}: got the shard {name!r}, wanted a name ending in .safetensors of a file beside the index"
            )
    return names


def _tensors(path: Path, keys: set[str]) -> list[tuple[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if differing := sorted(keys.symmetric_difference(file.keys())):
                raise ValueError(
                    f"{path.name}: got a shard that differs from its index in {len(differing)} keys "
                    f"({', '.join(differing[:4])}); the two are of different models, or one is damaged"
                )
            return [(key, file.get_tensor(key).clone()) for key in sorted(keys)]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: got a damaged safetensors file ({error})") from error
