"""The models of this library under their names in timm, without importing timm.

If timm is loaded already, :func:`install` registers at once. Otherwise it puts a finder in front of ``sys.meta_path``
that watches for the one name "timm", lets the other finders load it, registers behind the last line of timm's own
import, and then leaves ``sys.meta_path``. Where timm is never imported nothing happens, and nothing here can make
``import timm`` fail that would not have failed by itself.
"""

from __future__ import annotations

import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from .features import FeatureExtractor
from .lvvit import LVViT
from .registry import MODELS, create_model

__all__ = ["default_cfgs", "install"]

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711), "crop_pct": 1.0}


def _config(name: str) -> dict[str, Any]:
    """What timm's data pipeline and fine-tuning ask of a model (timm's ``pretrained_cfg``)."""
    dense = MODELS[name].family is LVViT
    return {
        "url": "",
        "num_classes": MODELS[name].config.get("num_classes", 1000),
        "input_size": (3, 224, 224),
        "pool_size": None,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.conv1" if dense else "patch_embed.proj",
        "classifier": ("head", "aux_head") if dense else "head",
        **(_CLIP if "clip" in name else _IMAGENET),
    }


default_cfgs: dict[str, dict[str, Any]] = {name: _config(name) for name in MODELS}  # read by timm's register_model


def install() -> None:
    """Register every model with timm: now if timm is loaded, else as soon as it is. Calling it again does nothing."""
    if hasattr(sys.modules.get("timm.models"), "create_model"):
        register()
    elif not any(isinstance(finder, TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TimmFinder())


def register() -> None:
    """Register every model that timm does not know under its name yet; timm must be loaded."""
    timm_models = sys.modules["timm.models"]
    register_model, is_model = (getattr(timm_models, name, None) for name in ("register_model", "is_model"))
    if register_model is None or is_model is None:
        warnings.warn(
            "repavit_ops: this timm has no timm.models.register_model, so its create_model does not know our models; "
            "install timm>=1.0 or call repavit_ops.models.create_model",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    for name in MODELS:
        if not is_model(name):
            # timm lists the function in this module's __all__, so it must be there
            globals()[name] = register_model(_entrypoint(name))


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """The function that ``timm.create_model(name, …)`` calls."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        **kwargs: Any,
    ) -> nn.Module:
        if (feature_cls := kwargs.pop("feature_cls", None)) is not None:
            kwargs["output_fmt"] = _format(name, feature_cls)
        model = create_model(name, pretrained=pretrained, **kwargs)
        given = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
        model.pretrained_cfg = model.default_cfg = {  # type: ignore[assignment]
            "architecture": name,
            **default_cfgs[name],
            **given,
            **(pretrained_cfg_overlay or {}),
        }
        if isinstance(model, FeatureExtractor):
            for key in ("num_classes", "classifier"):
                model.pretrained_cfg.pop(key, None)  # type: ignore[operator,union-attr]
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"``repavit_ops.models.create_model({name!r}, …)``."
    return build


def _format(name: str, feature_cls: Any) -> str | None:
    """The layout of the maps of timm's feature classes: the getter's is NCHW, the list's the model's own."""
    if feature_cls in ("getter", "list"):
        return "NCHW" if feature_cls == "getter" else None
    raise ValueError(f"feature_cls: got {feature_cls!r}, wanted 'getter' or 'list' for {name}")


class TimmFinder(importlib.abc.MetaPathFinder):
    """Finds "timm" as the other finders do, with a loader that registers our models once timm has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = RegisteringLoader(spec.loader, self)
        return spec


class RegisteringLoader(importlib.abc.Loader):
    """Loads as ``loader`` does, then registers and takes ``finder`` out of ``sys.meta_path``."""

    def __init__(self, loader: Any, finder: TimmFinder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # resources, source: whatever else is asked of the module's loader
