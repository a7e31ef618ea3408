"""A model as a backbone: the maps behind some of its blocks or stages, under the names that timm's users know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .classifier import ImageClassifier, take_indices

Index = int | Sequence[int] | None


class FeatureInfo:
    """What each block or stage of a model gives: channels, pixels per cell, name.

    Every question is answered for the features that are taken, or for the blocks ``idx`` (one number or several).

    Args:
        info: one dictionary a block or stage, with num_chs, reduction and module.
        out_indices: those that are taken.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info, self.out_indices = list(info), tuple(out_indices)

    def get(self, key: str, idx: Index = None) -> Any:
        """The value under ``key``, or a list of them."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[index][key] for index in (self.out_indices if idx is None else idx)]

    def channels(self, idx: Index = None) -> Any:
        """Channels of the maps."""
        return self.get("num_chs", idx)

    def reduction(self, idx: Index = None) -> Any:
        """Pixels of the image on one side of a map's cell."""
        return self.get("reduction", idx)

    def module_name(self, idx: Index = None) -> Any:
        """Names of the blocks or stages."""
        return self.get("module", idx)

    def get_dicts(self, keys: Sequence[str] | None = None, idx: Index = None) -> Any:
        """The dictionaries, whole or of ``keys`` alone."""
        if isinstance(idx, int):
            return self.info[idx] if keys is None else {key: self.info[idx][key] for key in keys}
        return [self.get_dicts(keys, index) for index in (self.out_indices if idx is None else idx)]

    def __getitem__(self, index: Any) -> Any:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


class FeatureExtractor(nn.Module):
    """``forward_intermediates`` of a model as a module, with what comes behind the last map cut off.

    Shapes:
        x        [B, in_chans, H, W]
        returns  one map a block or stage, in their order: [B, C, h, w], or [B, h, w, C] for ``output_fmt`` "NHWC"

    Args:
        model: an :class:`ImageClassifier`, which is cut down in place.
        out_indices: which blocks or stages: a number the last n, a sequence those; None the model's default (the last
            three blocks, or all stages).
        output_fmt: "NCHW"; for Swin "NHWC", too. None: the model's default ("NHWC" for Swin, as in timm).
        norm: apply the final norm, as ``forward_intermediates`` does.

    Raises:
        ValueError: an index or a format that the model does not have.
    """

    def __init__(
        self,
        model: ImageClassifier,
        out_indices: int | Sequence[int] | None = None,
        *,
        output_fmt: str | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.output_fmt = model.feature_format if output_fmt is None else output_fmt
        model.check_format(self.output_fmt)
        info = model.feature_info
        wanted = take_indices(len(info), model.feature_indices if out_indices is None else out_indices)
        self.feature_info = FeatureInfo(info, wanted)
        self.out_indices = model.prune_intermediate_layers(wanted, prune_norm=not norm)
        self.norm = norm
        self.model = model

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the model's."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.model.forward_intermediates(
            x, self.out_indices, norm=self.norm, output_fmt=self.output_fmt, intermediates_only=True
        )
        return maps
