"""The same predictor on a Ray cluster: Ray Data reads, decodes and computes, and comes back shard by shard.

Decoding tasks and predicting actors overlap, and Ray holds back who is ahead. What comes back is small: paths, errors,
labels, features. Rows carry their place, so that a shard is whole in whatever order Ray gives them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .decoding import Decoded, blank
from .predictor import Predictor, without_unreadable
from .preprocessing import Preprocessing
from .sources import Shard

DECODER = 1  # CPUs that are left to decoding, at least
CARRIED = ("number", "place", "last", "path", "error")  # columns that an actor only hands on


def computed(
    predictor: Predictor, shards: list[Shard], batch: int, address: str, actors: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every shard's number and columns, as they are finished.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: the cluster has fewer CPUs than ``actors`` predictors and one decoder take.
        ValueError: the predictor's model was given as a module, which other machines do not have.
    """
    try:
        import ray
    except ImportError:
        raise ImportError('ray: it is not installed: pip install "repavit-ops[ray]"') from None
    if not predictor.named:
        raise ValueError("ray: got a predictor of a module, wanted one of a file or name that every machine can open")
    if not shards:
        return
    _connect(address)
    count = _actors(int(ray.cluster_resources().get("CPU", 0)), predictor.threads, actors)
    data = ray.data.from_items(
        [{"number": shard.number, "kind": shard.kind, "paths": list(shard.paths)} for shard in shards],
        override_num_blocks=len(shards),
    )
    # not map_batches, which actors of one CPU would run inside (findings/ray_fuses_decoders_into_actors.sh)
    pixels = data.flat_map(_Decoder(predictor.preprocessing, batch), num_cpus=DECODER)
    named = os.path.abspath(predictor.name) if os.path.exists(predictor.name) else predictor.name
    arguments = {**predictor.arguments, "preprocessing": predictor.preprocessing, "threads": predictor.threads}
    results = pixels.map_batches(
        _Actor,
        fn_constructor_args=(named, arguments),
        batch_size=batch,
        num_cpus=predictor.threads,
        compute=ray.data.ActorPoolStrategy(size=count),
    )
    # a decoder hands on its batches one by one, not a shard at once; else actors wait, and the last ones work alone
    results.context.target_max_block_size = batch * blank(predictor.preprocessing).nbytes
    results.context.enable_progress_bars = False
    empty = {shard.number for shard in shards}
    for number, columns in _whole(results.iter_batches(batch_size=None, batch_format="numpy")):
        empty.discard(number)
        yield number, columns
    nothing = torch.zeros((0, *blank(predictor.preprocessing).shape), dtype=torch.uint8)
    for number in sorted(empty):
        yield number, {"path": [], **predictor.predict(nothing), "error": []}


def _connect(address: str) -> None:
    """Join the cluster at an address; "auto": the one that runs, else one of this machine alone."""
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError:
        if address != "auto":
            raise
        ray.init(log_to_driver=False)


def _actors(cpus: int, threads: int, wanted: int | None) -> int:
    """How many predictors of so many threads there are, with a CPU left to decode; says so where there can be none."""
    count = (cpus - DECODER) // threads if wanted is None else wanted
    if count < 1 or count * threads + DECODER > cpus:
        raise RuntimeError(
            f"ray: the cluster has {cpus} CPUs, wanted {max(count, 1) * threads + DECODER}: {max(count, 1)} actors of "
            f"{threads} threads and {DECODER} for decoding; give fewer actors or threads, or a larger cluster"
        )
    return count


class _Decoder:
    """A shard in, a row for each of its images out."""

    def __init__(self, preprocessing: Preprocessing, batch: int) -> None:
        self.preprocessing, self.batch = preprocessing, batch

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        shard = Shard(int(row["number"]), str(row["kind"]), tuple(str(path) for path in row["paths"]))
        place = 0
        for got in Decoded([shard], self.preprocessing, self.batch):
            left = len(got.paths)
            for path, pixels, error in zip(got.paths, got.pixels.numpy(), got.errors, strict=True):
                left -= 1
                carried = {"number": shard.number, "place": place, "last": got.last and not left}
                yield {**carried, "path": path, "pixels": pixels, "error": error or ""}
                place += 1


class _Actor:
    """One predictor of the cluster."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.predictor = Predictor(name, **arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = torch.from_numpy(np.ascontiguousarray(batch.pop("pixels")))
        errors = [error or None for error in batch["error"]]
        return {**batch, **without_unreadable(self.predictor.predict(pixels), errors)}


def _whole(batches: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Shards whose rows are all there, each in the order of its images."""
    waiting: dict[int, list[dict[str, np.ndarray]]] = {}
    missing: dict[int, int] = {}  # rows; negative while the last one is not there
    for batch in batches:
        for number in np.unique(batch["number"]).tolist():
            rows = {name: column[batch["number"] == number] for name, column in batch.items()}
            waiting.setdefault(number, []).append(rows)
            missing[number] = missing.get(number, 0) - len(rows["place"])
            missing[number] += int((rows["place"][rows["last"]] + 1).sum())
            if missing[number] == 0:
                yield number, _columns(waiting.pop(number))
    if waiting:
        raise RuntimeError(f"ray: {len(waiting)} shards came back in part; run again, which does them anew")


def _columns(parts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(rows["place"])
    computed = {name: column[order] for name, column in rows.items() if name not in CARRIED}
    paths, errors = rows["path"][order].tolist(), rows["error"][order].tolist()
    return {"path": paths, **computed, "error": [error or None for error in errors]}
