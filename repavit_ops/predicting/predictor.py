"""Images in, labels, scores and features out: one fused model, on the threads or the GPU that it was given."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .decoding import decoded
from .opening import opened, processor_of
from .preprocessing import Preprocessing, preprocessing_of

Columns = dict[str, np.ndarray]


class Predictor:
    """A fused model over encoded images; ``predictor({"bytes": […]})`` is also what Ray's ``map_batches`` calls.

    The columns that it returns: ``label`` int32 [B] (the best class), ``labels`` int32 [B, k] and ``scores`` float32
    [B, k] (softmax) if the model has classes; ``features`` float32 [B, C] in front of the classifier if asked for;
    ``error``, the reason why an image could not be read, else None; labels of such a row are -1, its numbers NaN.

    Args:
        model: a model, unfused or fused, in evaluation mode; or what :func:`repavit_ops.predicting.opening.opened`
            takes: a file of ``save_packed``, a checkpoint of ours, a folder or name of transformers, a name of timm.
        preprocessing: of images; default what the model's library says, at the size the model was built for.
        processor: instead, a folder or name of transformers' image processor, which packed files do not hold.
        top_k: k, at most as many as there are classes.
        features: return them too.
        half: features in float16; ValueError where a number does not fit.
        dtype: that the model computes in; default its own.
        quantize: "int8" for products in whole numbers, as :func:`repavit_ops.fuse` takes it.
        device: that the model computes on, "cpu" or a GPU, "cuda" or "cuda:1". Images are decoded on the CPU.
        threads: of PyTorch; default the CPUs that Ray gave this task, else those that the process may run on. They are
            set again at every call, since PyTorch keeps those of whoever set them last.

    Raises:
        ValueError: top_k or threads below 1; a model file that is none; features of a model that has none; both a
            preprocessing and a processor; a device that PyTorch does not see here; a packed file on a GPU; Ray gave the
            task a GPU, which nothing here would use.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        preprocessing: Preprocessing | None = None,
        processor: str | os.PathLike[str] | None = None,
        top_k: int = 5,
        features: bool = False,
        half: bool = False,
        dtype: torch.dtype | None = None,
        quantize: str = "none",
        device: torch.device | str = "cpu",
        threads: int | None = None,
    ) -> None:
        for name, number in (("top_k", top_k), ("threads", threads)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: got {number}, wanted at least 1")
        if preprocessing is not None and processor is not None:
            raise ValueError("processor: got one beside preprocessing=, which says the same; give one of them")
        self.device = _seen(device)
        if self.device.type == "cpu" and (gpus := _given_by_ray("GPU")):
            raise ValueError(
                f"num_gpus: Ray gave this predictor {gpus:g} GPUs, and it computes on CPUs; leave num_gpus out, and "
                'give num_cpus, or device="cuda"'
            )
        self.arguments: dict[str, Any] = {"top_k": top_k, "features": features, "half": half, "dtype": dtype}
        self.arguments["quantize"] = self.quantize = quantize
        self.arguments["device"] = str(self.device)
        self.named = isinstance(model, str | Path)
        self.name = str(model) if isinstance(model, str | Path) else type(model).__name__
        self.top_k, self.features, self.half = top_k, features, half
        self.threads = given_cpus() if threads is None else threads
        torch.set_num_threads(self.threads)
        found = opened(model, dtype, quantize, self.device)
        self.model = found.model
        self.dtype = next(p.dtype for p in self.model.parameters() if p.dtype.is_floating_point)
        of_images = found.processor if processor is None else processor_of(processor)
        self.preprocessing = preprocessing or preprocessing_of(self.model, of_images)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of encoded images, ``{"bytes": […]}``, or of files, ``{"path": […]}``; other columns are kept."""
        given = batch["bytes"] if "bytes" in batch else [Path(path).read_bytes() for path in batch["path"]]
        decoded = [self.decoded(bytes(data)) for data in given]
        pixels = torch.from_numpy(np.stack([image for image, _ in decoded]))
        kept = {name: column for name, column in batch.items() if name != "bytes"}
        errors = [error for _, error in decoded]
        return {**kept, **without_unreadable(self.predict(pixels), errors), "error": np.array(errors, dtype=object)}

    def decoded(self, data: bytes) -> tuple[np.ndarray, str | None]:
        """The pixels of an encoded image, uint8 [3, H, W], and None; zeros and the reason where it cannot be read."""
        return decoded(self.preprocessing, data)

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> Columns:
        """Predictions for pixels, uint8 [B, 3, H, W] of the size that the preprocessing makes."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        logits, features = self._run(self.preprocessing.normalised(pixels.to(self.device), self.dtype))
        columns: Columns = {}
        if logits is not None:
            scores, labels = logits.float().softmax(-1).topk(min(self.top_k, logits.shape[-1]))
            columns["labels"] = labels.to(torch.int32).cpu().numpy()
            columns["label"] = columns["labels"][:, 0].copy()
            columns["scores"] = scores.cpu().numpy()
        if features is not None:
            columns["features"] = features.float().cpu().numpy()
            if self.half:
                columns["features"] = _halved(columns["features"])
        return columns

    def _run(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits and features; None what there is not, or is not asked for."""
        model: Any = self.model
        if self.features and hasattr(model, "forward_head") and hasattr(model, "get_classifier"):
            features = model.forward_head(model.forward_features(x), pre_logits=True)
            head = model.get_classifier()
            return (None if isinstance(head, nn.Identity) else head(features)), features
        out = model(x)
        if isinstance(out, Tensor):
            if self.features:
                raise ValueError(f"features: {self.name} has no forward_features and forward_head to take them from")
            has_classes = not isinstance(getattr(model, "head", None), nn.Identity)
            return (out, None) if has_classes else (None, out)
        logits = getattr(out, "logits", None)
        if logits is not None and not self.features:
            return logits, None
        tokens = getattr(out, "last_hidden_state", None)
        if logits is not None or tokens is None:
            raise ValueError(f"features: {self.name} returns none beside its logits; give its base model")
        pooled = getattr(out, "pooler_output", None)
        return None, tokens[:, 0] if pooled is None else pooled


def without_unreadable(columns: Columns, errors: Sequence[str | None]) -> Columns:
    """Columns whose rows with an error are -1 or NaN: what a model says of a black image is no prediction."""
    wrong = np.array([error is not None for error in errors], dtype=bool)
    for values in columns.values():
        values[wrong] = -1 if values.dtype.kind == "i" else np.nan
    return columns


def _seen(device: torch.device | str) -> torch.device:
    """A device; raises where PyTorch has none such here."""
    found = torch.device(device)
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(found.type)
    if count is None:
        raise ValueError(f"device: got {str(device)!r}, wanted cpu or cuda")
    if (found.index or 0) >= count:
        raise ValueError(
            f"device: got {str(device)!r}, and PyTorch {torch.__version__} sees {count} CUDA GPUs here; give cpu, or "
            "one of those, or install a build of PyTorch for this GPU"
        )
    return found


def given_cpus() -> int:
    """CPUs that Ray gave the task that this runs in, else those that the process may run on."""
    if assigned := _given_by_ray("CPU"):
        return max(1, int(assigned))
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _given_by_ray(resource: str) -> float:
    """How much of a resource Ray gave the task that this runs in; 0 where it is none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return 0.0
    try:
        return float(ray.get_runtime_context().get_assigned_resources().get(resource, 0))
    except AssertionError:  # this is no task, and was given nothing
        return 0.0


def _halved(features: np.ndarray) -> np.ndarray:
    limit = float(np.finfo(np.float16).max)
    if not (largest := float(np.abs(features).max(initial=0.0))) <= limit:
        raise ValueError(f"features: got numbers up to {largest:.4g}, float16 holds {limit:.0f}; keep them in float32")
    return features.astype(np.float16)
