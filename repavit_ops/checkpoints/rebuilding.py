"""Recipes: JSON values from which a fused model's tree is built again on the meta device, without weights or code.

A recipe names a constructor that is installed here (this library's, timm's, transformers') and its arguments; the tree
is then fused as :func:`repavit_ops.fuse` fuses, without weights. What has no such name is built by the caller.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..fusing.verbs import fused_structure, stacked
from ..nn.packed_weights import PackedWeights
from ..nn.stand_in import original_class
from ..version import __version__
from .description import KINDS, build, describe
from .idled_timm import READING

Recipe = dict[str, Any]
Builder = Callable[[], nn.Module]
OURS, TIMM, TRANSFORMERS, CALLER = "repavit_ops", "timm", "transformers", "caller"
# what lets a config of transformers name other files, or code
FETCHING = ("auto_map", "backbone", "use_timm_backbone", "use_pretrained_backbone", "quantization_config")
ATTENTIONS = ("eager", "sdpa")  # any other name may be a kernel that transformers would download
# attributes of operators that were set behind their construction: how many channels a merged FFN had, the form of its
# packed copy, and what calibration saw of it
SET_LATER = ("hidden", "quantize", "quantization_error")
PLAIN = (bool, int, float, str, type(None), torch.dtype)
IMMATERIAL = frozenset(  # attributes that change nothing that a model in evaluation mode computes
    {"training", "p", "drop_prob", "drop_rate", "scale_by_keep", "name_or_path", "gradient_checkpointing"}
)


def recipe_of(fused: nn.Module, arguments: Mapping[str, Any] | None, by_caller: bool) -> Recipe:
    """How the tree of a fused model is built.

    Args:
        fused: the model.
        arguments: of timm's ``create_model``, beside the name; None to take those that the model tells.
        by_caller: the caller builds it.

    Raises:
        ValueError: no constructor is known for the model; says what to pass.
    """
    if by_caller:
        return {"of": CALLER}
    cls = original_class(fused)
    if cls.__module__.startswith("transformers.models."):
        return _of_transformers(fused, cls)
    name = (getattr(fused, "pretrained_cfg", None) or {}).get("architecture")
    if cls.__module__.startswith("timm.") and name:
        return {"of": TIMM, "name": name, "arguments": _timm_arguments(fused) if arguments is None else dict(arguments)}
    try:
        return {"of": OURS, "model": describe(fused)}
    except ValueError as error:
        raise ValueError(
            f"model: got a {cls.__module__}.{cls.__qualname__}, which no constructor by name is known for ({error}); "
            "pass build=, a function that makes the unfused model, to save_packed and to load_packed"
        ) from error


def versions_of(recipe: Recipe) -> dict[str, str]:
    """Versions of this library and of the one whose constructor a recipe names."""
    versions = {OURS: __version__}
    if recipe["of"] in (TIMM, TRANSFORMERS):
        versions[recipe["of"]] = _library(recipe["of"]).__version__
    return versions


def tree_of(recipe: Recipe, operators: Mapping[str, Any], given: Builder | None) -> nn.Module:
    """The fused tree of a recipe, on the meta device and in evaluation mode.

    Args:
        recipe: of :func:`recipe_of`.
        operators: descriptions by name of modules that hold an operator, as :func:`operator_of` makes them.
        given: the caller's function that makes the unfused model.

    Raises:
        ImportError: the library that the recipe names is not installed.
        ValueError: the recipe is none, names what is no architecture, or would read other files; ``given`` is missing.
    """
    origin = recipe.get("of")
    if (origin == CALLER) != (given is not None):
        raise ValueError(
            f"build: got {'a function' if given else 'none'}, wanted {'none' if given else 'the function'} that the "
            "model was saved with: save_packed and load_packed take the same"
        )
    if origin == OURS:
        return _told(stacked(build(recipe["model"])).eval(), operators)
    makers = {TIMM: _timm_model, TRANSFORMERS: _transformers_model}
    if given is None and origin not in makers:
        raise ValueError(f"got a recipe of {origin!r}, wanted one of {OURS}, {', '.join(makers)}, {CALLER}")
    with torch.device("meta"):
        source = given() if given is not None else makers[str(origin)](recipe)
    tree = fused_structure(source.to("meta").eval())
    parts = dict(tree.named_modules())
    for name, described in operators.items():
        if not isinstance(parts.get(name), PackedWeights):
            continue  # of another tree; whoever compares says so
        tree.set_submodule(name, build({key: value for key, value in described.items() if key not in SET_LATER}))
    return _told(tree.eval(), operators)


def operator_of(module: PackedWeights) -> dict[str, Any] | None:
    """What the weights of a module decided about it when it was fused, as a description; None where nothing can."""
    if type(module) not in KINDS:
        return None
    own = vars(module)
    return {**describe(module), **{name: own[name] for name in SET_LATER if own.get(name) is not None}}


def differences(saved: nn.Module, built: nn.Module) -> Iterator[str]:
    """Where two trees differ in classes, names, shapes or plain attributes, one line each."""
    ours, theirs = dict(saved.named_modules()), dict(built.named_modules())
    for name in sorted(ours.keys() ^ theirs.keys()):
        yield f"{name} is only in the {'saved' if name in ours else 'rebuilt'} one"
    for name in ours.keys() & theirs.keys():
        a, b, path = ours[name], theirs[name], f"{name}." if name else ""
        if type(a) is not type(b):
            yield f"{name or 'its root'} is a {type(a).__name__}, rebuilt as a {type(b).__name__}"
            continue
        for kind in ("_parameters", "_buffers"):
            yield from _differing(f"{path}", _shapes(getattr(a, kind)), _shapes(getattr(b, kind)))
        yield from _differing(path, _plain_attributes(a), _plain_attributes(b))
        for key, value in vars(a).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}{key} is a tensor that is neither a parameter nor a buffer"


def _differing(path: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            yield f"{path}{key} is {ours.get(key)}, rebuilt as {theirs.get(key)}"


def _shapes(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, list[int] | None]:
    return {name: None if tensor is None else list(tensor.shape) for name, tensor in tensors.items()}


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    def is_plain(value: Any) -> bool:
        return isinstance(value, PLAIN) or (isinstance(value, tuple | list) and all(map(is_plain, value)))

    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if name[0] != "_" and name not in IMMATERIAL and is_plain(value)
    }


def _told(tree: nn.Module, operators: Mapping[str, Any]) -> nn.Module:
    """The tree, its operators told what was set behind their construction."""
    for name, module in tree.named_modules():
        vars(module).update({key: value for key, value in operators.get(name, {}).items() if key in SET_LATER})
    return tree


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm_arguments(model: Any) -> dict[str, Any]:
    """Arguments of ``create_model`` that a model of timm tells: those that differ from its architecture's own."""
    config, found = model.pretrained_cfg, {}
    if (count := getattr(model, "num_classes", None)) is not None and count != config.get("num_classes"):
        found["num_classes"] = count
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and list(size) != list(config.get("input_size", ()))[1:]:
        found["img_size"] = list(size)
    return found


def _timm_model(recipe: Recipe) -> nn.Module:
    timm = _library(TIMM)
    name, arguments = recipe["name"], recipe["arguments"]
    if not timm.is_model(name):  # a path or a hub's address would be read, and believed
        raise ValueError(f"got {name!r}, wanted the name of one of timm's architectures")
    if reading := sorted(READING & arguments.keys()):
        raise ValueError(f"got the argument {reading[0]} for timm, wanted none that reads other files")
    model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return model


# --- transformers -----------------------------------------------------------------------------------------------------


def _of_transformers(fused: Any, cls: type) -> Recipe:
    config = json.loads(fused.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # of the machine that it was saved on
    return {
        "of": TRANSFORMERS,
        "class": cls.__name__,
        "config_class": type(fused.config).__name__,
        "config": config,
        "attention": fused.config._attn_implementation,
    }


def _transformers_model(recipe: Recipe) -> nn.Module:
    cls = _of_library(recipe["class"], "PreTrainedModel")
    config_class = _of_library(recipe["config_class"], "PretrainedConfig")
    if recipe["attention"] not in ATTENTIONS:
        raise ValueError(f"got the attention {recipe['attention']!r}, wanted one of {', '.join(ATTENTIONS)}")
    _require_whole(recipe["config"])
    config = config_class.from_dict(recipe["config"], attn_implementation=recipe["attention"])
    model: nn.Module = cls(config)
    return model


def _of_library(name: str, base: str) -> Any:
    """A model's or config's class of transformers by its name."""
    library = _library(TRANSFORMERS)
    cls = getattr(library, name, None) if name.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, getattr(library, base)):
        raise ValueError(f"got {name!r}, wanted the name of one of transformers' classes of models")
    return cls


def _require_whole(config: Any) -> None:
    """Raise ValueError if a config, or one inside it, would make transformers read files or run code."""
    if isinstance(config, list):
        for value in config:
            _require_whole(value)
    if not isinstance(config, dict):
        return
    for name, value in config.items():
        if (name in FETCHING and value) or ("attn_implementation" in name and value not in (None, *ATTENTIONS)):
            raise ValueError(f"got {name} = {value!r} in a config of transformers, wanted none that reads other files")
        _require_whole(value)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"its model is of {name}, which is not installed: pip install {name}") from None
