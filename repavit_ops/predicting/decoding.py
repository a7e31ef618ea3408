"""Shards into batches of pixels: what the processes that read and decode do, here and on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from .preprocessing import Preprocessing
from .sources import Shard


class Batch(NamedTuple):
    """Decoded images of one shard; ``last`` of it if so; ``unopened``: the file of each that could not be opened."""

    shard: int
    pixels: torch.Tensor
    paths: list[str]
    errors: list[str | None]
    unopened: list[str]
    last: bool


class Decoded(torch.utils.data.IterableDataset):
    """Batches of decoded images; of several workers each takes whole shards in turn."""

    def __init__(self, shards: list[Shard], preprocessing: Preprocessing, batch: int, folder: str = "") -> None:
        self.shards, self.preprocessing, self.batch, self.folder = shards, preprocessing, batch, folder

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for shard in self.shards[first::step]:
            yield from self._of(shard)

    def _of(self, shard: Shard) -> Iterator[Batch]:
        images: list[np.ndarray] = []
        paths: list[str] = []
        errors: list[str | None] = []
        unopened: list[str] = []

        def batch(last: bool) -> Batch:
            stacked = np.stack(images) if images else np.zeros((0, *blank(self.preprocessing).shape), np.uint8)
            return Batch(shard.number, torch.from_numpy(stacked), paths, errors, unopened, last)

        for encoded in shard.images(self.folder):
            if len(images) == self.batch:
                yield batch(last=False)
                images, paths, errors, unopened = [], [], [], []
            if encoded.error is None:
                image, error = decoded(self.preprocessing, encoded.data)
            else:
                image, error = blank(self.preprocessing), encoded.error
            images.append(image)
            paths.append(encoded.path)
            errors.append(error)
            unopened.append(encoded.unopened)
        yield batch(last=True)


def decoded(preprocessing: Preprocessing, data: bytes) -> tuple[np.ndarray, str | None]:
    """The pixels of an encoded image, uint8 [3, H, W], and None; zeros and the reason where it cannot be read."""
    try:
        return preprocessing.pixels(data), None
    except Exception as error:  # decoders have a class of error each
        reason = str(error).splitlines()[0] if str(error) else ""
        return blank(preprocessing), f"{type(error).__name__}: {reason}"


def blank(preprocessing: Preprocessing) -> np.ndarray:
    """What stands in the place of an image that cannot be read."""
    return np.zeros((3, *preprocessing.size), dtype=np.uint8)
