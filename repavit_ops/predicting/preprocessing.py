"""From the bytes of an image to what a model takes: by timm's or transformers' own numbers, in PIL and PyTorch."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.patch_embed import image_of
from ..nn.stand_in import original_class

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LARGEST = 2**27  # pixels of an image that is decoded: 384 MiB of them
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # PIL's numbers
CROP_PCT = 0.875  # of models that name none: 224 out of 256


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs: resized, the middle cut out, normalised.

    Attributes:
        size: pixels (height, width) that the model is given.
        resize: pixels (height, width) that an image covers, in proportion, before the middle is cut out.
        squash: resize to exactly ``resize``, out of proportion.
        interpolation: PIL's number.
        corner_down: the middle's corner is rounded down, as transformers does; else to the nearest (torchvision).
        mean, std: of the channels, in 0..1.
    """

    size: tuple[int, int]
    resize: tuple[int, int]
    squash: bool = False
    corner_down: bool = False
    interpolation: int = INTERPOLATIONS["bicubic"]
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]

    def pixels(self, data: bytes) -> np.ndarray:
        """An encoded image as uint8 [3, H, W].

        Raises:
            ValueError: the bytes are empty, or the image has more than 2**27 pixels, which are not decoded.
            Exception: whatever PIL raises for what it cannot read.
        """
        from PIL import Image

        if not data:
            raise ValueError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below says it
            opened = Image.open(io.BytesIO(data))
        with opened as image:
            width, height = image.size
            if width * height > LARGEST:
                raise ValueError(f"{width} x {height} pixels, more than the {LARGEST} that are decoded")
            down, across = self._resized(height, width)
            resized = image.convert("RGB").resize((across, down), self.interpolation)
        around = (down - self.size[0], across - self.size[1])
        top, left = (side // 2 if self.corner_down else round(side / 2) for side in around)
        middle = resized.crop((left, top, left + self.size[1], top + self.size[0]))
        return np.ascontiguousarray(np.asarray(middle).transpose(2, 0, 1))

    def normalised(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [B, 3, H, W] → what the model takes, in float32 first."""
        mean, std = (torch.tensor(numbers, device=pixels.device).view(1, -1, 1, 1) for numbers in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).to(dtype)

    def at(self, size: tuple[int, int]) -> Preprocessing:
        """The same for inputs of another size, the middle as large a share of the image as before."""
        if size == self.size:
            return self
        resize = [
            math.floor(side * whole / part) for side, whole, part in zip(size, self.resize, self.size, strict=True)
        ]
        return replace(self, size=size, resize=(resize[0], resize[1]))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.squash:
            return self.resize
        if self.resize[0] == self.resize[1]:  # the shorter side, and the longer one rounded down, as torchvision does
            short = self.resize[0]
            return (short, short * width // height) if height <= width else (short * height // width, short)
        factor = max(self.resize[0] / height, self.resize[1] / width)
        return max(round(height * factor), self.size[0]), max(round(width * factor), self.size[1])


def preprocessing_of(model: nn.Module, processor: Any = None) -> Preprocessing:
    """What a model's library says of its images, for the size that the model was built for.

    timm's config goes on naming the size of the pretrained weights when ``img_size`` was another; here the model's own
    counts.

    Args:
        model: of this library, timm or transformers.
        processor: transformers' image processor; None for other models.

    Raises:
        ValueError: the model is of another library and comes with neither; the config asks for a crop or an
            interpolation that is not known here. Says what to give.
    """
    config = getattr(model, "pretrained_cfg", None)
    if processor is not None:
        found = _of_processor(processor)
    elif config:
        found = _of_timm(config)
    elif not original_class(model).__module__.startswith("repavit_ops."):
        raise ValueError(
            f"model: {original_class(model).__module__}.{type(model).__name__} does not say how its images are "
            "prepared; give processor= (--processor), a folder of transformers that its processor is in, or "
            "preprocessing=Preprocessing(…)"
        )
    else:
        size = image_of(model)[0]
        found = Preprocessing(size, tuple(math.floor(side / CROP_PCT) for side in size))  # type: ignore[arg-type]
    return found.at(_built_for(model) or found.size)


def _built_for(model: Any) -> tuple[int, int] | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = getattr(getattr(model, "config", None), "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _of_timm(config: dict[str, Any]) -> Preprocessing:
    size = (int(config["input_size"][1]), int(config["input_size"][2]))
    mode, name = config.get("crop_mode") or "center", config.get("interpolation") or "bicubic"
    if mode not in ("center", "squash") or name not in INTERPOLATIONS:
        raise ValueError(
            f"model: its config asks for the crop {mode!r} by {name!r}; give preprocessing=Preprocessing(…)"
        )
    share = config.get("crop_pct") or CROP_PCT
    resize = (math.floor(size[0] / share), math.floor(size[1] / share))
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocessing(size, resize, mode == "squash", interpolation=INTERPOLATIONS[name], mean=mean, std=std)


def _of_processor(processor: Any) -> Preprocessing:
    def pair(size: Any) -> tuple[int, int] | None:
        height, width = (_get(size, name) for name in ("height", "width"))
        return None if height is None or width is None else (int(height), int(width))

    edge, exact = _get(processor.size, "shortest_edge"), pair(processor.size)
    crop = pair(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    if not processor.do_resize or not processor.do_normalize or (exact is None and (edge is None or crop is None)):
        raise ValueError(
            f"processor: {type(processor).__name__} has size {processor.size}, crop {crop}, do_resize "
            f"{processor.do_resize}, do_normalize {processor.do_normalize}; give preprocessing=Preprocessing(…)"
        )
    resize = exact or (int(edge), int(edge))
    return Preprocessing(
        crop or resize,
        resize,
        squash=exact is not None,
        corner_down=True,
        interpolation=int(processor.resample),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


def _get(size: Any, name: str) -> Any:
    return size.get(name) if hasattr(size, "get") else getattr(size, name, None)
