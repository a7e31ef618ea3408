"""The embedded run: other processes read and decode, this one computes and writes, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import backends
from ..checkpoints.mapped_file import sha256_of
from .decoding import Batch, Decoded
from .output import Output, joined
from .predictor import Predictor, without_unreadable
from .preprocessing import Preprocessing
from .sources import Shard, shards_of

SHARD = 1024  # image files in an output file


class Unreadable(RuntimeError):
    """An image cannot be read, and the run is a strict one."""


@dataclass(frozen=True)
class Summary:
    """What a run came to: images in the folder, those of this call, its seconds, and which are unreadable and why."""

    images: int
    computed: int
    seconds: float
    unreadable: list[tuple[str, str]]

    def __str__(self) -> str:
        rate = self.computed / self.seconds if self.seconds else 0.0
        return (
            f"{self.images} images, {self.computed} of them now, {rate:.1f} a second; {len(self.unreadable)} unreadable"
        )


class Rows(NamedTuple):
    """Finished rows of one shard, in order, with their paths and errors; ``last`` of it if so."""

    shard: int
    columns: dict[str, Any]
    last: bool


def predict(
    predictor: Predictor,
    source: str | Path,
    out: str | Path,
    *,
    batch: int = 64,
    workers: int = 1,
    shard: int = SHARD,
    strict: bool = False,
    progress: bool = False,
    ray: str | None = None,
    actors: int | None = None,
) -> Summary:
    """Run a predictor over all images of a source, into a folder of Parquet files; a run that was killed goes on.

    Each output file is of one shard of the source: a column ``path``, those that :class:`Predictor` returns, and
    ``error``. Each image is in the folder once.

    Args:
        predictor: the model.
        source: as :func:`repavit_ops.predicting.sources.shards_of` takes it.
        out: the folder.
        batch: images at once.
        workers: processes that read and decode; 0: this one.
        shard: image files to an output file; Parquet and tar files are a shard each.
        strict: raise at the first image that cannot be read.
        progress: a bar with images a second and the time left, on stderr (tqdm).
        ray: compute on a Ray cluster: its address, or "auto" for the one that is running or else one here. Ray decodes
            and computes where it finds CPUs, ``workers`` does not count; this process writes.
        actors: predictors on the cluster; default as many as there is room for, with a CPU left for decoding.

    Raises:
        ImportError: pyarrow or Pillow is not installed.
        RuntimeError: another process writes there; the cluster's machines have no room for the actors and one decoder;
            one of them cannot open an image that this one can.
        OSError: the folder cannot be written or the disk is full: what was written before stands.
        Unreadable: strict, and an image cannot be read; the parts that were done stay.
        ValueError: batch, shard or workers are out of range; the folder holds a run of other settings; a machine of the
            cluster does not have the model's file, or has another.
    """
    for name, number, least in (("batch", batch, 1), ("shard", shard, 1), ("workers", workers, 0)):
        if number < least:
            raise ValueError(f"{name}: got {number}, wanted at least {least}")
    _require_installed()
    settings = _settings(predictor, source, shard)
    output = Output(Path(out), settings, lambda: shards_of(source, shard))
    began, computed = time.perf_counter(), 0
    try:
        with _Bar(output, progress) as bar:
            waiting: dict[int, list[dict[str, Any]]] = {}
            left = output.left()
            if ray is None:
                found = _computed_here(predictor, left, batch, workers)
            else:
                found = _computed_on_ray(predictor, left, batch, ray, actors, settings["model_sha256"])
            for rows in found:
                paths, errors = rows.columns["path"], rows.columns["error"]
                if strict and any(errors):
                    row = next(row for row, error in enumerate(errors) if error)
                    raise Unreadable(f"{paths[row]}: {errors[row]}")
                waiting.setdefault(rows.shard, []).append(rows.columns)
                computed += len(paths)
                if rows.last:
                    output.write(rows.shard, joined(waiting.pop(rows.shard)))
                    backends.release_freed_memory()  # glibc keeps what lay between these rows
                bar.moved(len(paths))
        count, unreadable = output.finish()
    finally:
        output.close()
    return Summary(count, computed, time.perf_counter() - began, unreadable)


def _computed_on_ray(
    predictor: Predictor, shards: list[Shard], batch: int, address: str, actors: int | None, digest: str | None
) -> Iterator[Rows]:
    from .on_ray import computed

    for shard, columns in computed(predictor, shards, batch, address, actors, digest):
        yield Rows(shard, columns, last=True)


def _computed_here(predictor: Predictor, shards: list[Shard], batch: int, workers: int) -> Iterator[Rows]:
    for got in _batches(shards, predictor.preprocessing, batch, workers):
        columns = without_unreadable(predictor.predict(got.pixels), got.errors)
        yield Rows(got.shard, {"path": got.paths, **columns, "error": got.errors}, got.last)


def _batches(shards: list[Shard], preprocessing: Preprocessing, batch: int, workers: int) -> Iterator[Batch]:
    dataset = Decoded(shards, preprocessing, batch)
    workers = min(workers, len(shards))
    if not workers:
        yield from dataset
        return
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=2)
    yield from loader


def _settings(predictor: Predictor, source: str | Path, shard: int) -> dict[str, Any]:
    """What a run cannot change half-way."""
    weights = Path(predictor.name)
    return {
        "source": str(source),
        "shard": shard,
        "model": predictor.name,
        "model_sha256": sha256_of(weights) if weights.is_file() else None,
        "dtype": str(predictor.dtype).removeprefix("torch."),
        "quantize": predictor.quantize,
        "top_k": predictor.top_k,
        "features": predictor.features,
        "half": predictor.half,
        "preprocessing": {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(predictor.preprocessing).items()
        },
    }


def _require_installed() -> None:
    try:
        import PIL  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f'predict: {error.name} is missing: pip install "repavit-ops[predict]"') from error


class _Bar:
    """Progress on stderr; nothing where it was not asked for."""

    def __init__(self, output: Output, wanted: bool) -> None:
        self._bar: Any = None
        if wanted:
            from tqdm import tqdm

            counted = all(shard.kind == "files" for shard in output.shards)
            left = output.left()
            total = sum(len(shard.paths) for shard in left) if counted else None
            name = f"{len(output.shards) - len(left)} of {len(output.shards)} parts were there"
            self._bar = tqdm(total=total, unit="image", desc=name, smoothing=0.1)

    def __enter__(self) -> _Bar:
        return self

    def moved(self, images: int) -> None:
        if self._bar is not None:
            self._bar.update(images)

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
